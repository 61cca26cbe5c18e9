"""What the benchmark of Flower's rounds makes of times; and its app."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.flower_speed import APP, PAGE, WORKLOADS, Times, Workload, figures, missed, table
from benchmarks.flower_ways import Done, distance
from benchmarks.report import put
from shoal.flower import run

WORK = Workload("a title", 4, 4, 3, faster=20.0)


def times(*rounds: float, first: float) -> Times:
    return Times(rounds, first)


def test_times_begin_after_the_first_round_and_with_the_process() -> None:
    ends = np.array([103.0, 104.5, 104.7, 105.0])

    found = Times.of(Done(100.0, 9.0, {"ends": ends}))
    assert found.rounds == pytest.approx([0.2, 0.3]) and found.first == 4.5


def test_ratios_are_those_of_a_repetition() -> None:
    """The machine was slow in the second one, for both."""
    ours = [times(0.1, 0.1, 9.9, first=1.0), times(1.0, first=10.0), times(0.1, first=1.0)]
    theirs = [times(3.0, first=5.0), times(25.0, first=50.0), times(2.0, first=4.0)]
    line = figures(WORK, ours, theirs, 1e-12)

    assert (line["times_faster"], line["times_sooner"]) == (25.0, 5.0)
    assert (line["shoal_ms_per_round"], line["flwr_ms_per_round"]) == (100.0, 3000.0)
    assert missed({"a": line}) == []
    assert table({"a": line}).splitlines()[2] == (
        "| a title | 3000 | 100.0 | 25.0 (≥ 20) | 5.0 | 1.0 | 5.0 (≥ 4) | 1e-12 |"
    )


def test_what_is_not_as_it_must_be() -> None:
    slow = figures(WORK, [times(1.0, first=1.0)], [times(19.0, first=3.9)], 0.5)
    nodes = {name: figures(WORKLOADS[name], [times(t, first=1)], [], None) for name, t in (("1,000", 1), ("10,000", 2))}

    assert missed({"a": slow, **nodes}) == [
        "a: results are 5.0e-01 apart",
        "a: a round is 19.0 times as fast, not 20",
        "a: the first round is over 3.9 times as soon, not 4",
        "a round of 10,000 registered nodes takes 2.00 times that of 1,000, not 1.2",
    ]
    assert missed({"1,000": nodes["1,000"]}) == []
    assert "10,000 registered nodes takes 2.00 times" in table(nodes)
    assert missed({"a": slow | {"apart": float("nan"), "times_faster": 20.0, "times_sooner": 4.0}}) != []


def test_distance() -> None:
    expected = {"a": np.array([1e6, 0.5])}

    assert distance(expected, {"a": np.array([1e6 + 1, 0.5])}) == pytest.approx(1e-6)
    assert distance(expected, {}) == float("inf")


def test_the_page_has_a_place_for_the_table() -> None:
    assert "the table" in put(PAGE.read_text("utf-8"), "speed", "the table", "benchmarks/flower_speed.py")


@pytest.mark.parametrize(
    "config", [{"evaluate": True}, {"asked": 2}, pytest.param({"model": "2nn"}, marks=pytest.mark.slow)]
)
def test_the_app(config: dict[str, str | int | bool], tmp_path: Path) -> None:
    given: dict[str, str | int | bool] = {"nodes": 4, "asked": 4, "rounds": 2, "result": str(tmp_path / "r.npz")}
    given |= config
    done = run(APP, dict(given), nodes=4, workers=0, out=tmp_path / "runs", progress="none")
    with np.load(tmp_path / "r.npz") as arrays:
        found = dict(arrays)

    assert list(done.metrics.counted) == [given["asked"]] * 2 and done.failures.empty
    assert list(np.diff(found["ends"]) > 0) == [True, True]
    if config == {"evaluate": True}:
        assert found["w"] == pytest.approx(np.full(10, 1.5 * 1.5))
