"""A line of the audit log is what the journal and the checkpoint say, and is chained to the one before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.protos.codec import encode
from shoal.protos.messages import Failure, Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.server.audit import Audit, Misfit, digest, entries, origin, owners, seal
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Round, start
from shoal.server.remote import Member
from shoal.server.runs import RunFolder
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.selectors import Uniform

LAYOUT = Layout((Entry("w", Segment.TRAINABLE, "float32", (3,)), Entry("n", Segment.COUNTERS, "int64", ())))
INITIAL = Parameters(LAYOUT, torch.zeros(3), torch.zeros(0), torch.tensor([7]))
HEADER, BUFFERS = encode(Update(np.array([1, 2, 3], "float32"), 12, counters=np.array([7])))


def point(round: int, *counted: str) -> Checkpoint:
    begun = start(FedAvg(), Uniform(), INITIAL)
    state = {"parameters": torch.full((3,), float(round))}
    return replace(begun, round=round, state=state, clients={"late": 0, **dict.fromkeys(counted, round)})


def cohort(round: int) -> Sequence[Member]:
    names = {"a": HEADER, "late": HEADER, "broken": None}
    return [Member(name, f"{name} {round}", "CN" if name == "a" else "", header) for name, header in names.items()]


def written(path: Path, first: int, last: int) -> list[dict[str, Any]]:
    with closing(RunFolder(path)) as folder:
        audit = Audit(folder, "a run", point(first - 1, "a"), cohort)
        for number in range(first, last + 1):
            numbers = {"counted": 1.0, "failed": 1.0, "seconds": 0.5}
            failed = [Failure("broken", number, "it broke")]
            audit.on_round_end(Round(number, numbers, failures=failed), point(number, "a"))
            audit.on_checkpoint(point(number, "a"))
    return [json.loads(line) for line in (path / "audit.jsonl").read_text().splitlines()]


def model(value: float) -> str:
    """By hand: three floats, no buffers, one counter."""
    return hashlib.sha256(np.full(3, value, "<f4").tobytes() + np.array([7], "<i8").tobytes()).hexdigest()


def test_a_line_says_whose_updates_made_the_model(tmp_path: Path) -> None:
    (line,) = written(tmp_path, 1, 1)
    payload = hashlib.sha256(b"".join(BUFFERS)).hexdigest()

    assert (line["round"], line["before"], line["after"]) == (1, model(0), model(1))
    assert line["clients"] == [
        {"client": "a", "identity": "CN", "nonce": "a 1", "sha256": payload, "examples": 12},
        {"client": "late", "identity": None, "nonce": "late 1", "reason": "the round was over without it"},
        {"client": "broken", "identity": None, "nonce": "broken 1", "reason": "it broke"},
    ]


def test_the_log_hears_of_each_round(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    lines = [line | {"time": ""} for line in RunFolder(tmp_path).lines("log.jsonl")]

    numbers = {"counted": 1, "failed": 1, "seconds": 0.5}
    assert lines == [{"time": "", "kind": "round", "round": number, **numbers} for number in (1, 2)]


def test_lines_are_chained_also_across_a_restart(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    lines = written(tmp_path, 3, 4)
    previous = hashlib.sha256(b"a run").hexdigest()
    for line in lines:
        sha256 = line.pop("sha256")
        assert line["previous"] == previous
        assert sha256 == hashlib.sha256(json.dumps(line).encode()).hexdigest()
        previous = sha256

    assert [entry["after"] for entry in entries(tmp_path / "audit.jsonl", "a run")] == [model(n) for n in range(1, 5)]
    assert [line["before"] for line in lines] == [model(n) for n in range(4)]


@pytest.mark.slow
def test_every_byte_counts(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    path = tmp_path / "audit.jsonl"
    log = path.read_bytes()
    for at in range(len(log)):
        path.write_bytes(log[:at] + bytes([log[at] ^ 1]) + log[at + 1 :])
        with pytest.raises(Misfit) as found:
            list(entries(path, "a run"))
        assert found.value.line == log[:at].count(b"\n") + 1


def test_a_run_that_is_stopped_before_its_first_round_has_no_line(tmp_path: Path) -> None:
    with closing(RunFolder(tmp_path)) as folder:
        Audit(folder, "a run", point(0), cohort).on_checkpoint(point(0))

    assert not (tmp_path / "audit.jsonl").exists()


def test_a_log_of_another_run_does_not_fit(tmp_path: Path) -> None:
    written(tmp_path, 1, 1)
    with pytest.raises(Misfit, match="line 1 does not follow the beginning of run another"):
        list(entries(tmp_path / "audit.jsonl", "another"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"round": 2}, "is of round 2"),
        ({"clients": 3}, "is no line of an audit log"),
        ({"clients": [{"client": "a", "identity": None, "nonce": "n"}]}, "its fields are others"),
        ({"more": 1}, "its fields are others"),
    ],
)
def test_a_line_that_is_sealed_but_wrong_does_not_fit(tmp_path: Path, content: dict[str, Any], why: str) -> None:
    usual = {"round": 1, "time": "", "before": "", "after": "", "clients": [], "previous": origin("a run")}
    (tmp_path / "audit.jsonl").write_bytes(seal(usual | content)[0])
    with pytest.raises(Misfit, match=f"line 1 .*{why}"):
        list(entries(tmp_path / "audit.jsonl", "a run"))


def test_the_parameters_hash_is_of_their_bytes() -> None:
    assert digest(INITIAL) == model(0)
    assert digest(replace(INITIAL, counters=torch.tensor([8]))) != model(0)


def test_owners_are_those_who_proved_an_identity_first_whatever_happened_to_the_lines(tmp_path: Path) -> None:
    assert owners(tmp_path / "audit.jsonl") == {}
    written(tmp_path, 1, 2)
    log = tmp_path / "audit.jsonl"
    first, second = log.read_bytes().splitlines(keepends=True)
    second = second.replace(b'"identity": "CN"', b'"identity": "thief"').replace(
        b'"identity": null', b'"identity": "L"', 1
    )
    log.write_bytes(b"[1]\n{}\n" + first + b"\xff\n" + second + first[:-20])

    assert owners(log) == {"a": "CN", "late": "L"}
