"""No client can fill the disk with lines, and none can silence another."""

from __future__ import annotations

import errno
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shoal.protos.messages import Failure
from shoal.server import patience
from shoal.server.log import ALL, EACH, Log, Rate
from shoal.server.patience import Patience
from shoal.server.runs import RunFolder


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def a_log(each: Rate = EACH, all: Rate = ALL) -> tuple[Log, list[Any], Clock]:
    lines, clock = list[Any](), Clock()
    return Log(lines.append, each, all, clock), lines, clock


def told(lines: list[Any]) -> Counter[str]:
    return Counter(line["kind"] for line in lines)


def test_a_client_gets_its_ration_and_what_is_left_out_is_counted() -> None:
    log, lines, clock = a_log()  # twenty lines a kind, then one in ten minutes
    for _ in range(100):
        for kind in ("joined", "left"):
            log.write(kind, client="mallory", reason="again")
    log.write("joined", client="bob")

    assert told(lines) == {"joined": 21, "left": 20, "left out": 1}
    out = lines[-2]
    assert (out["of"], out["lines"], out["clients"]) == ("joined", 80, ["mallory"])
    clock.now = 599.0
    log.write("left", client="mallory")
    assert told(lines)["left"] == 20
    clock.now = 600.0
    log.write("left", client="mallory")
    assert told(lines)["left"] == 21
    assert lines[-2]["lines"] == 81


def test_however_long_and_under_however_many_names_lines_are_bounded() -> None:
    log, lines, clock = a_log()
    day = 86_400
    for number in range(20_000):
        clock.now = day * number / 20_000
        log.write("joined", client=f"mallory {number}")
    log.close()

    written = sum(line["kind"] == "joined" for line in lines)
    assert 1000 + day / 60 - 2 <= written <= 1000 + day / 60
    assert len(lines) <= 2 * written + 1
    assert written + sum(line["lines"] for line in lines if line["kind"] == "left out") == 20_000
    assert max(len(line["clients"]) for line in lines if line["kind"] == "left out") <= 10
    assert len(log._purses) <= 4096


def test_what_is_kept_of_clients_is_forgotten_when_it_says_nothing() -> None:
    log, _, clock = a_log(Rate(2, 1.0), Rate(10**6, 1.0))
    for number in range(12_000):
        clock.now = number / 1000
        log.write("joined", client=f"client {number}")

    assert len(log._purses) <= 4096


def test_the_servers_own_lines_are_always_written() -> None:
    log, lines, _ = a_log()
    for number in range(2000):
        log.write("round", round=number)

    assert len(lines) == 2000


def test_failures_of_a_hostile_client_take_bounded_space(tmp_path: Path) -> None:
    with closing(RunFolder(tmp_path)) as folder:
        for number in range(2000):
            kind = "rejected" if number % 2 else "failed"
            folder.on_failure(Failure("mallory", number, "x" * 2000, "y" * 20_000, kind))
        folder.on_failure(Failure("bob", 1, "why"))
    lines = list(folder.lines("log.jsonl"))

    assert Counter(line["kind"] for line in lines) == {"failed": 21, "rejected": 20, "left out": 2}
    assert sum(line["lines"] for line in lines if line["kind"] == "left out") == 2000 - 40
    assert (tmp_path / "log.jsonl").stat().st_size < 41 * 23_000


def test_a_disk_that_refused_is_logged_when_it_takes_lines_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSE", 0.0)
    said, refusals = list[str](), [errno.ENOSPC, errno.EIO]

    def write() -> str:
        if refusals:
            raise OSError(refusals.pop(0), "no room")
        return "done"

    with closing(RunFolder(tmp_path)) as folder:
        log = folder.log
        patient = Patience(said.append, lambda why, seconds: log("disk refused", reason=why, seconds=seconds))
        assert patient(write) == patient(write) == "done"
    (line,) = folder.lines("log.jsonl")

    assert (line["kind"], line["reason"], 0 <= line["seconds"] < 10) == ("disk refused", "[Errno 28] no room", True)
    assert len(said) == 2
