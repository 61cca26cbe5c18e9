"""The rows of a comparison against numbers worked out by hand; the statistics have a file of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.simulations.comparison import Point, Row, curve, main_metric, rows

TARGET = {"accuracy": 0.8}
T2, T3 = 12.706204736, 4.3026527297  # Student's t at 97.5 % with one degree of freedom and with two


def run(last: float, reached: int | None = None, ten: float | None = None, megabytes: float = 0.0) -> dict[str, Any]:
    """A run's summary; up and down cost the same."""
    spent = {"bytes_up": megabytes * 5e5, "bytes_down": megabytes * 5e5, "seconds": megabytes / 10}
    return {
        "rounds": 30,
        "last": {"test_loss": 1.0, "test_accuracy": last},
        "best": {"test_accuracy": {"value": last + 0.1, "round": 5}},
        "mean_of_last_10": {} if ten is None else {"test_accuracy": ten},
        "target": {"accuracy": {"value": 0.8, "round": reached} | ({} if reached is None else spent)},
        "bytes_up": 2e6,
        "bytes_down": 4e6,
        "seconds": 2.0,
        "failed": 1,
    }


CELLS = {
    ("", "a", 0): run(0.80, reached=10, ten=0.5, megabytes=3),
    ("", "a", 1): run(0.84, reached=20, ten=0.7, megabytes=5),
    ("", "a", 2): run(0.70, reached=None, ten=0.6),
    ("", "b", 0): run(0.90, reached=8, megabytes=2),
    ("", "b", 2): run(0.82, reached=16, megabytes=4),
}


def made(seeds: int = 3, target: dict[str, float] | None = None) -> list[Row]:
    return rows([""], ["a", "b"], range(seeds), CELLS, "test_accuracy", TARGET if target is None else target)


def test_mean_deviation_and_interval() -> None:
    """0.80, 0.84 and 0.70: the mean is 0.78, the squares of 0.02, 0.06 and −0.08 add up to 0.0104, over n − 1 = 2."""
    a = made()[0]
    sd = math.sqrt(0.0104 / 2)

    assert a.mean == pytest.approx(0.78, abs=1e-12)
    assert a.sd == pytest.approx(sd, abs=1e-12)
    assert (a.low, a.high) == pytest.approx((0.78 - T3 * sd / math.sqrt(3), 0.78 + T3 * sd / math.sqrt(3)), abs=1e-9)
    assert (a.mean_of_last_10, a.sd_of_last_10) == pytest.approx((0.6, 0.1), abs=1e-12)
    assert a.best == pytest.approx(0.88, abs=1e-12)
    assert (a.seeds, a.finished, a.megabytes, a.seconds, a.client_failures) == (3, 3, 6.0, 2.0, 3)


def test_differences_are_taken_seed_by_seed() -> None:
    """b − a is 0.10 and 0.12 where both finished; the difference of the means, 0.86 − 0.78, would be 0.08."""
    a, b = made()

    assert (a.difference, a.difference_sd, a.pairs) == (None, None, 0)
    assert b.difference == pytest.approx(0.11, abs=1e-12)
    assert b.difference_sd == pytest.approx(math.sqrt(2 * 0.01**2), abs=1e-12)
    assert (b.difference_low, b.difference_high) == pytest.approx((0.11 - T2 * 0.01, 0.11 + T2 * 0.01), abs=1e-9)
    assert (b.pairs, b.finished, b.seeds) == (2, 2, 3)
    assert b.difference_of_last_10 is None


def test_who_did_not_reach_the_target_counts_with_all_rounds() -> None:
    a, b = made()

    assert (a.reached, a.rounds_to_target, a.rounds_to_target_median) == (2, 20.0, 20.0)  # 10, 20 and all 30
    assert a.megabytes_to_target == pytest.approx((3 + 5 + 6) / 3)
    assert a.seconds_to_target == pytest.approx((0.3 + 0.5 + 2.0) / 3)
    assert (b.reached, b.rounds_to_target, b.megabytes_to_target) == (2, 12.0, 3.0)


def test_who_was_stopped_early_counts_with_the_rounds_of_the_others() -> None:
    stopped = run(0.5) | {"rounds": 4}
    a, b = rows([""], ["a", "b"], [0], {("", "a", 0): run(0.9, 10), ("", "b", 0): stopped}, "test_accuracy", TARGET)

    assert (a.rounds_to_target, b.rounds_to_target) == (10.0, 30.0)


def test_all_rounds_are_those_of_the_scenario() -> None:
    finished = {(f"rounds={n}", "a", 0): run(0.5) | {"rounds": n} for n in (10, 50)}
    short, long = rows(["rounds=10", "rounds=50"], ["a"], [0], finished, "test_accuracy", TARGET)

    assert (short.rounds_to_target, long.rounds_to_target) == (10.0, 50.0)


def test_nobody_reached_it() -> None:
    never = {("", "a", seed): run(0.5) for seed in range(2)}
    (row,) = rows([""], ["a"], range(2), never, "test_accuracy", TARGET)

    assert (row.reached, row.rounds_to_target, row.rounds_to_target_median) == (0, 30.0, None)


def test_one_seed_has_no_deviation() -> None:
    a, b = made(seeds=1)

    assert (a.sd, a.low, b.difference_sd, b.difference_low) == (None, None, None, None)
    assert b.difference == pytest.approx(0.10)


def test_without_a_target() -> None:
    row = made(target={})[0]

    assert (row.target, row.reached, row.rounds_to_target, row.megabytes_to_target) == (None, 0, None, None)


# --- tests -----------------------------------------------------------------------------------------------------------


def cells(arms: dict[str, list[float]], scenario: str = "") -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(scenario, arm, s): run(v) for arm, values in arms.items() for s, v in enumerate(values)}


BASE = [0.70, 0.71, 0.69, 0.72, 0.70, 0.68, 0.73, 0.70]
UP = [value + 0.02 + 0.001 * seed for seed, value in enumerate(BASE)]
MIXED = [value + 0.01 * (-1) ** seed for seed, value in enumerate(BASE)]


def test_p_values_are_holms_over_the_whole_table() -> None:
    """Eight seeds, all one way: p = 2/256. Four up, four down: p = 1. Two scenarios of two comparisons: m = 4."""
    there = cells({"a": BASE, "b": UP, "c": MIXED}, "x") | cells({"a": BASE, "b": UP, "c": MIXED}, "y")
    table = rows(["x", "y"], ["a", "b", "c"], range(8), there, "test_accuracy", {})

    assert [row.scenario + row.strategy for row in table] == ["xa", "xb", "xc", "ya", "yb", "yc"]
    assert [row.p for row in table] == [None, 2 / 256, 1.0] * 2
    assert [row.p_holm for row in table] == [None, pytest.approx(8 / 256), 1.0] * 2
    assert {(row.comparisons, row.seeds_needed) for row in table} == {(4, 8)}


def test_no_p_where_the_seeds_do_not_allow_one() -> None:
    seven = {
        key: summary for key, summary in cells({"a": BASE, "b": UP, "c": UP, "d": UP, "e": UP}).items() if key[2] < 7
    }
    table = rows([""], list("abcde"), range(7), seven, "test_accuracy", {})

    assert {(row.p, row.p_holm, row.seeds_needed) for row in table} == {(None, None, 8)}


def test_a_comparison_without_its_runs_still_counts_in_the_correction() -> None:
    there = {key: run for key, run in cells({"a": BASE, "b": UP, "c": UP}).items() if key[1:] != ("c", 0)}
    _, b, c = rows([""], list("abc"), range(8), there, "test_accuracy", {})
    del there["", "c", 1]
    _, b_alone, c_six = rows([""], list("abc"), range(8), there, "test_accuracy", {})

    assert (b.p_holm, c.p, c.p_holm) == (pytest.approx(4 / 256), 2 / 128, pytest.approx(4 / 256))
    assert (b_alone.p_holm, c_six.p, c_six.pairs) == (pytest.approx(4 / 256), None, 6)


def test_clients_are_averaged_over_seeds() -> None:
    fair = {"mean": 0.7, "weighted": 0.8, "variance": 0.01, "worst_10": 0.4, "best_10": 0.9, "clients": 10}
    two = {("", "a", 0): run(0.8) | {"fairness": {"accuracy": fair}},
           ("", "a", 1): run(0.8) | {"fairness": {"accuracy": fair | {"worst_10": 0.6, "weighted": None}}}}  # fmt: skip
    (row,) = rows([""], ["a"], [0, 1], two, "test_accuracy", {})

    assert (row.clients_mean, row.clients_weighted, row.clients_worst_10) == (0.7, 0.8, 0.5)
    assert row.clients_worst_10_high == pytest.approx(0.5 + T2 * 0.1)
    assert made()[0].clients_mean is None


# --- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "target", "metric"),
    [
        (["test_loss", "test_accuracy", "clients_accuracy"], {}, "test_accuracy"),
        (["test_loss", "test_mae"], {}, "test_mae"),
        (["test_loss"], {}, "test_loss"),
        (["test_loss", "test_accuracy"], {"loss": 0.5}, "test_loss"),
        ([], {}, "test_loss"),
    ],
)
def test_the_main_metric(names: list[str], target: dict[str, float], metric: str) -> None:
    assert main_metric([{"last": dict.fromkeys(names, 1.0)}], target) == metric


def test_a_curve_has_the_rounds_that_all_runs_have() -> None:
    def lines(values: list[float | None], sent: float) -> list[dict[str, Any]]:
        first = {"round": 0, "test_loss": values[0]}
        later = [
            {"round": r, "test_loss": v, "bytes_up": sent, "bytes_down": sent} for r, v in enumerate(values[1:], 1)
        ]
        return [first, *later]

    points = curve([lines([4.0, None, 2.0], 1e6), lines([6.0, 5.0, 1.0], 3e6)], "test_loss")

    assert points == [Point(0, 0.0, 5.0, 4.0, 6.0), Point(2, 8.0, 1.5, 1.0, 2.0)]
    assert curve([], "test_loss") == [] == curve([lines([1.0], 0)], "test_mae")
