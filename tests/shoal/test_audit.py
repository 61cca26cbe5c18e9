"""What ``shoal audit`` finds in a run folder that somebody has been at."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.audit import audit
from shoal.cli import main
from shoal.progress import display
from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import RunError
from shoal.protos.fleet_pb2_grpc import FleetStub
from shoal.protos.transport import Address
from shoal.serve import Door, Roster
from shoal.server.audit import origin, seal
from shoal.server.orders import Left
from shoal.server.runs import RunFolder
from shoal.server.serving import Serving
from tests.server.test_audit import point, written

ROUNDS = 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A served run that has finished, whose audit log and last checkpoint are real."""
    folder = RunFolder.create(tmp_path, "run")
    folder.write("experiment.toml", "")
    folder.write("env.json", {"run": "a run", "served": {}})
    folder.write("summary.json", {"status": "finished"})
    written(folder.path, 1, ROUNDS)
    folder.on_checkpoint(point(ROUNDS, "a"))
    return folder.path


def test_an_untouched_log_fits(run: Path) -> None:
    found = audit(run)

    assert (found.problem, found.line) == (None, None)
    assert (found.rounds, found.clients, found.counted, found.not_counted) == (ROUNDS, 3, ROUNDS, 2 * ROUNDS)
    assert audit(run, found.last).problem is None


@st.composite
def tampered(draw: st.DrawFn, data: bytes) -> tuple[bytes, int]:
    """The log with one change, and the line at which it must be found."""
    lines = data.splitlines(keepends=True)
    one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    what = draw(st.sampled_from(["change", "remove", "swap", "duplicate", "cut"]))
    if what == "change":
        at = draw(st.integers(0, len(data) - 1))
        byte = draw(st.integers(0, 255).filter(lambda byte: byte != data[at]))
        return data[:at] + bytes([byte]) + data[at + 1 :], data[:at].count(b"\n") + 1
    if what == "cut":
        at = draw(st.integers(0, len(data) - 1))
        return data[:at], data[:at].count(b"\n") + 1
    if what == "remove":
        return b"".join(lines[:one] + lines[one + 1 :]), one + 1
    if what == "duplicate":
        return b"".join([*lines[:other], lines[one], *lines[other:]]), other + (2 if one == other else 1)
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines), min(one, other) + 1


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_done_to_a_line_is_found_at_it(run: Path, data: st.DataObject) -> None:
    path = run / "audit.jsonl"
    log = path.read_bytes()
    changed, line = data.draw(tampered(log))
    try:
        path.write_bytes(changed)
        found = audit(run)
    finally:
        path.write_bytes(log)

    assert (found.line, found.problem is None) == ((None, True) if changed == log else (line, False))
    assert found.rounds == (ROUNDS if changed == log else line - 1)


def test_a_log_that_is_gone_is_missing(run: Path) -> None:
    (run / "audit.jsonl").unlink()

    assert audit(run).problem == f"line 1 is missing: the last checkpoint is of round {ROUNDS}"


def test_a_log_that_was_made_anew_does_not_end_with_what_was_kept(run: Path) -> None:
    kept, previous = audit(run).last, origin("a run")
    lines = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    with (run / "audit.jsonl").open("wb") as file:
        for line in lines:
            line.pop("sha256")
            sealed, previous = seal(line | {"time": "never", "previous": previous})
            file.write(sealed)

    assert audit(run).problem is None  # which is all that can be known from the folder alone
    assert "lines were cut off, or all made anew" in str(audit(run, kept).problem)


def test_another_model_is_found(run: Path) -> None:
    other = {"parameters": torch.full((3,), 4.5)}
    RunFolder(run).on_checkpoint(replace(point(ROUNDS, "a"), state=other))

    assert audit(run).problem == f"line {ROUNDS} says other parameters than the checkpoint of round {ROUNDS} holds"


def test_one_line_may_have_no_checkpoint_if_the_server_died(run: Path) -> None:
    written(run, ROUNDS + 1, ROUNDS + 1)
    assert "is of a round that no checkpoint holds: the last one is of round 4" in str(audit(run).problem)
    RunFolder(run).write("summary.json", {"status": "running"})
    assert audit(run).problem is None
    written(run, ROUNDS + 2, ROUNDS + 2)

    assert audit(run).line == ROUNDS + 1


def test_a_simulation_has_no_audit_log(run: Path) -> None:
    RunFolder(run).write("env.json", {"engine": "lean"})
    with pytest.raises(RunError, match="was not served"):
        audit(run)


def test_the_command_says_what_is_covered_and_what_does_not_fit(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shoal(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", "audit", str(run), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    last = audit(run).last
    code, said = shoal()
    assert (code, said.splitlines()[0]) == (0, f"{run}: 4 rounds, 3 clients, 4 updates counted, 8 not counted")
    assert f"last line: {last}" in said
    text = (run / "audit.jsonl").read_text()
    (run / "audit.jsonl").write_text(text.replace("it broke", "it smoke", 1))
    code, said = shoal()
    assert (code, said.splitlines()[1]) == (1, "line 1 was changed: its SHA-256 is not that of what it says")
    code, said = shoal("--json")
    assert (code, json.loads(said)["line"], json.loads(said)["rounds"]) == (1, 1, 0)


@pytest.mark.slow
def test_a_client_that_comes_and_goes_all_the_time_leaves_few_lines(tmp_path: Path) -> None:
    hello = [wire.Hello(versions=[1], client="mallory", instance=str(number)) for number in range(100)]
    with closing(RunFolder(tmp_path)) as folder, closing(Serving(Address("127.0.0.1", 0), None)) as serving:
        roster, left = Roster(folder, display("none")), 0
        with grpc.insecure_channel(str(serving.address)) as channel:
            for one in hello:
                assert len(list(FleetStub(channel).Connect(iter([wire.ConnectRequest(hello=one)])))) == 1
        while left < len(hello):
            event = serving.events.get(timeout=10)
            left += isinstance(event, Left)
            roster.hear(event)
    lines = list(folder.lines("log.jsonl"))

    assert len(lines) == 20 + 20 + 2
    assert [line["lines"] for line in lines[-2:]] == [80, 80]


def test_who_took_part_in_a_run_keeps_the_name_when_the_server_starts_again(run: Path) -> None:
    def said(client: str) -> wire.ConnectReply:
        hello = wire.Hello(versions=[1], client=client, instance="1")
        return next(iter(FleetStub(channel).Connect(iter([wire.ConnectRequest(hello=hello)]))))

    with (
        Door("127.0.0.1:0", insecure=True).open(begun=[run]) as serving,
        grpc.insecure_channel(str(serving.address)) as channel,
    ):
        assert said("late").HasField("welcome")  # came without a certificate before, too
        with pytest.raises(grpc.RpcError, match="client 'a' belongs to the certificate of 'CN', not of ''"):
            said("a")
