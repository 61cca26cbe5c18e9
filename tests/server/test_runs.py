"""The run folder."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shoal.protos.errors import RunError
from shoal.protos.messages import Failure
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.server.coordinator import Round, start
from shoal.server.fleet import Report
from shoal.server.runs import RunFolder, list_runs
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.selectors import Uniform

EMPTY, LAYOUT = torch.zeros(0), Layout((Entry("w", Segment.TRAINABLE, "float32", (2,)),))
POINT = start(FedAvg(), Uniform(), Parameters(LAYOUT, torch.zeros(2), EMPTY, EMPTY))


def test_numbers_rise_and_nothing_is_overwritten(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, name).path.name for name in ("a", "b", "../c d")]

    assert names == ["0001-a", "0002-b", "0003-c-d"]


def test_a_number_is_taken_once_whatever_the_name(tmp_path: Path) -> None:
    def announce(path: Path) -> None:
        if path.name == "0001-mine":
            (tmp_path / "0001-another").mkdir()

    assert RunFolder.create(tmp_path, "mine", announce).path.name == "0002-mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001-another", "0002-mine"]


def test_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: RunFolder.create(tmp_path, "x").path.name, range(20)))

    assert len(set(made)) == 20


def test_open_by_number(tmp_path: Path) -> None:
    made = RunFolder.create(tmp_path, "x")
    made.write("experiment.toml", "")

    assert RunFolder.open(tmp_path / "1").path == made.path == RunFolder.open(made.path).path
    assert [run.path for run in list_runs(tmp_path)] == [made.path]
    for missing in (tmp_path / "2", tmp_path / "x"):
        with pytest.raises(RunError, match="shoal runs"):
            RunFolder.open(missing)


def test_lines_of_a_round(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    reports = [Report("b", {"examples": 3.0, "loss": 0.5}), Report("a", {"examples": 4.0})]
    folder.on_evaluations(1, [Report("a", {})])
    folder.on_round_end(Round(1, {"counted": 2.0, "loss": math.nan}, reports, [Failure("c", 1, "why")]), POINT)
    folder.close()
    evaluate, train = folder.lines("clients.jsonl")

    assert next(folder.lines("metrics.jsonl")) == {"round": 1, "counted": 2, "loss": None}
    assert train == {
        "round": 1,
        "kind": "train",
        "client": ["b", "a"],
        "examples": [3, 4],
        "loss": [0.5, None],
        "failed": [{"client": "c", "reason": "why"}],
    }
    assert evaluate == {"round": 1, "kind": "evaluate", "client": ["a"]}


def test_a_failure_is_logged_with_its_traceback(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.on_failure(Failure("c", 2, "why", "Traceback …"))
    folder.close()
    line = next(folder.lines("log.jsonl"))

    assert (line["kind"], line["client"], line["round"], line["traceback"]) == ("failed", "c", 2, "Traceback …")


def test_rewind_drops_later_rounds_and_torn_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(5):
        folder.on_round_end(Round(number, {"x": 0.25}), POINT)
        folder.log("round", round=number)
    folder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "x"')
    lines = [b'{"round":  1}\n', b'{"round": 2, damaged}\n', b'{"round": 3}\n']
    (tmp_path / "audit.jsonl").write_bytes(b"".join(lines))
    folder.rewind(2)

    assert [line["round"] for line in folder.lines("metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "audit.jsonl").read_bytes() == lines[0] + lines[1]  # as they were, for who checks them
    assert [line["round"] for line in folder.lines("log.jsonl")] == [0, 1, 2, 3, 4]  # everything that happened


def test_a_client_names_no_number_as_a_line_names_its_own(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "x")
    told = [Report("a", dict.fromkeys(("round", "kind", "client", "failed", "loss"), 7.0))]
    folder.on_evaluations(1, told)
    folder.on_round_end(Round(1, {}, told), POINT)
    folder.close()

    evaluate, train = folder.lines("clients.jsonl")
    assert evaluate == {"round": 1, "kind": "evaluate", "client": ["a"], "loss": [7]}
    assert train == {"round": 1, "kind": "train", "client": ["a"], "loss": [7]}


def test_whole_files_are_replaced_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write("summary.json", {"a": 1.0, "b": math.inf})

    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1, "b": None}
    assert folder.read("summary.json") == {"a": 1, "b": None}
    with pytest.raises(RunError, match=r"missing\.json"):
        folder.read("missing.json")


def test_there_is_one_writer(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path), RunFolder(tmp_path)
    folder.claim()
    with pytest.raises(RunError, match="being written by another process"):
        other.claim()
    folder.close()
    other.claim()
    other.close()


def test_a_folder_that_cannot_hold_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot hold runs"):
        RunFolder.create(tmp_path / "file" / "runs", "x")
    assert len(RunFolder.create(tmp_path, "x" * 300).path.name) < 80
