"""The list of faults that a deployment must bear, and where it is shown that it does.

    python -m tests.chaos.catalogue [--missing] [--publish]

A fault of the deck names the rows that it shows (:attr:`tests.chaos.faults.Fault.rows`); a test is marked
``@pytest.mark.fault(8)``. This runs all marked tests (with ``--missing`` those that have not passed yet), takes the
trials from the campaign's results, and makes the table of docs/reliability.md. A row that nothing shows is an error,
and ``tests/chaos/test_catalogue.py`` finds it without running anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import page
from tests.chaos.deck import DECK
from tests.chaos.table import RESULTS

__all__ = ["ROWS", "Row", "Shown", "rendered", "uncovered"]

TESTS = Path(__file__).parents[1]
RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"  # how each marked test ended


@dataclass(frozen=True)
class Row:
    """``outside`` is a measurement that shows it, too, beside deck and tests."""

    number: int
    fault: str
    required: str
    outside: str = ""


@dataclass
class Shown:
    """What tests of a row came to, and trials of its faults."""

    tests: Counter[str] = field(default_factory=Counter)
    trials: int = 0
    survived: int = 0
    identical: int = 0


LOAD, HOSTILE, FUZZ = "`benchmarks/load.py`", "`benchmarks/hostile.py`", "`make fuzz`"
ROWS = (
    Row(1, "client killed amid its upload", "the part that is there is kept; it goes on from there; counted once"),
    Row(2, "client killed while it trains", "asked again, or the quorum closes the round; no wait beyond the lease"),
    Row(
        3, "server killed in a round, in each state", "the same round goes on; no receipt is lost or doubled; same bits"
    ),
    Row(4, "both die, or the power goes", "as 3; a receipt leaves when its answer is on the disk"),
    Row(5, "network cut, losing, late, half-open; a NAT that forgets", "progress renews the lease; back-off; goes on"),
    Row(6, "an answer sent twice", "DUPLICATE, the same receipt; counted once"),
    Row(7, "an answer replayed: old round, other run, captured call", "refused; bound to the task's nonce and session"),
    Row(8, "NaN or infinity in an update", "refused with the reason; the round goes on"),
    Row(9, "wrong shape, dtype or name, extra tensors, broadcasts", "refused before memory is taken"),
    Row(10, "too large, announced or sent; gzip bomb", "refused at the manifest; memory bounded", HOSTILE),
    Row(11, "absurd numbers of examples", "refused"),
    Row(12, "an answer to a round that is over; a wrong base", "refused, and told to wait for a new task"),
    Row(13, "clocks that are wrong by hours or years", "no client's clock is in the protocol"),
    Row(14, "server's disk full, read-only or failing", "no receipt; the last checkpoint stays; goes on with room"),
    Row(15, "slow-loris: idle connections, a byte a second, stalled streams", "others are served", HOSTILE),
    Row(16, "very many clients at once", "all are counted; memory bounded", LOAD),
    Row(19, "noise: fuzzed messages, random bytes, HTTP/1, wrong ALPN", "a status, no crash, others are served", FUZZ),
    Row(20, "chunks damaged, swapped, overlapping, wrong hash", "found; the upload goes on from the last right byte"),
    Row(21, "checkpoint or journal damaged at its end", "the torn tail is cut; the checkpoint before is taken"),
    Row(22, "versions that differ, unknown capabilities", "negotiated, or refused with advice"),
    Row(23, "client out of memory, raising, or with a broken import", "its traceback at the server; the round goes on"),
    Row(24, "stragglers; a third of the clients fails in each round", "quorum, deadline and over-selection"),
    Row(25, "a thousand rounds", "memory does not grow", LOAD),
    Row(
        26, "stopped for an upgrade; port in use at the restart", "the round ends, the run resumes; one clear sentence"
    ),
)
NUMBERS = tuple(row.number for row in ROWS)


class Tally:
    """A plugin of pytest: the outcome of each marked test, by row."""

    def __init__(self, known: Mapping[str, str]) -> None:
        """``known`` are outcomes of earlier runs: those that passed are not run again."""
        self.rows = {number: Shown() for number in NUMBERS}
        self._known, self._marked = known, dict[str, set[int]]()
        self.ended = dict[str, str]()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Only the marked ones are run; AssertionError if one is of a row that is not there."""
        for item in items:
            if numbers := {number for mark in item.iter_markers("fault") for number in mark.args}:
                self._marked[item.nodeid] = numbers
                assert numbers <= self.rows.keys(), f"{item.nodeid} is marked with {numbers}, not all of them rows"
        self.ended = {node: "passed" for node in self._marked if self._known.get(node) == "passed"}
        items[:] = [item for item in items if item.nodeid in self._marked.keys() - self.ended.keys()]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of set-up, call and tear-down."""
        if report.outcome != "passed" or report.when == "call":
            self.ended[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        for node, outcome in self.ended.items():
            for number in self._marked[node]:
                self.rows[number].tests[outcome] += 1


def add_trials(rows: Mapping[int, Shown], campaign: Mapping[str, Any]) -> None:
    """The campaign's counts, each to all rows that its fault shows."""
    by_name = {fault.name: fault.rows for fault in DECK}
    for line in campaign["rows"]:
        for number in by_name.get(line["fault"], ()):
            rows[number].trials += line["trials"]
            rows[number].survived += line["survived"]
            rows[number].identical += line["identical"]


def uncovered(marked: Iterable[int]) -> list[int]:
    """The rows that neither the deck nor a mark shows."""
    shown = {number for fault in DECK for number in fault.rows} | set(marked)
    return [number for number in NUMBERS if number not in shown]


def rendered(rows: Mapping[int, Shown], campaign: bool) -> str:
    """The table; ValueError names the rows that nothing shows."""
    if missing := uncovered(number for number, shown in rows.items() if shown.tests):
        raise ValueError(
            f"nothing shows the faults {missing}; mark a test with @pytest.mark.fault(…) or name a fault's rows"
        )
    lines = ["| # | fault | required | shown by | result |", "|---|---|---|---|---|"]
    for row in ROWS:
        shown = rows[row.number]
        lines.append(
            f"| {row.number} | {row.fault} | {row.required} | {_by(row, shown)} | {_result(row, shown, campaign)} |"
        )
    return "\n".join(lines) + "\n"


def _by(row: Row, shown: Shown) -> str:
    faults = sum(row.number in fault.rows for fault in DECK)
    parts = [_many(faults, "fault of the campaign", "faults of the campaign")] if faults else []
    parts += [_many(shown.tests.total(), "test", "tests")] if shown.tests else []
    return ", ".join([*parts, *([row.outside] if row.outside else [])])


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _result(row: Row, shown: Shown, campaign: bool) -> str:
    parts = []
    if any(row.number in fault.rows for fault in DECK):
        told = f"{shown.trials} trials, {shown.survived} survived, {shown.identical} bit-identical"
        parts.append(told if campaign else "campaign not yet run")
    ended = [f"{shown.tests[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if shown.tests[outcome]]
    return "; ".join([*parts, ", ".join(ended)] if ended else parts)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--publish", action="store_true", help="write the table of the docs")
    parser.add_argument("--missing", action="store_true", help="run only tests that have not passed yet")
    given = parser.parse_args(words)
    tally = Tally(json.loads(RECORD.read_text()) if given.missing and RECORD.exists() else {})
    code = int(pytest.main(["-q", "--no-header", str(TESTS)], plugins=[tally]))
    RECORD.write_text(json.dumps(dict(sorted(tally.ended.items())), indent=1) + "\n")
    campaign = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    add_trials(tally.rows, campaign or {"rows": []})
    print(table := rendered(tally.rows, campaign is not None))
    if given.publish:
        page.write("python -m tests.chaos.catalogue", table)
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code  # all have passed


if __name__ == "__main__":
    sys.exit(main())
