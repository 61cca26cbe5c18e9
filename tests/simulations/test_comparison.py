"""The statistics of a comparison against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.simulations.comparison import Point, Row, curve, headings, main_metric, on_significance, rows, texts

TARGET = {"accuracy": 0.8}


def run(last: float, reached: int | None = None, ten: float | None = None, megabytes: float = 0.0) -> dict[str, Any]:
    """A run's summary; up and down cost the same."""
    spent = {"bytes_up": megabytes * 5e5, "bytes_down": megabytes * 5e5}
    return {
        "last": {"test_loss": 1.0, "test_accuracy": last},
        "best": {"test_accuracy": {"value": last + 0.1, "round": 5}},
        "mean_of_last_10": {} if ten is None else {"test_accuracy": ten},
        "target": {"accuracy": {"value": 0.8, "round": reached} | ({} if reached is None else spent)},
        "bytes_up": 2e6,
        "bytes_down": 4e6,
        "failed": 1,
    }


CELLS = {
    ("a", 0): run(0.80, reached=10, ten=0.5, megabytes=3),
    ("a", 1): run(0.84, reached=20, ten=0.7, megabytes=6),
    ("a", 2): run(0.70, reached=None, ten=0.6),
    ("b", 0): run(0.90, reached=8, megabytes=2),
    ("b", 2): run(0.82, reached=16, megabytes=4),
}


def made(seeds: int = 3, target: dict[str, float] | None = None) -> list[Row]:
    return rows(["a", "b"], range(seeds), CELLS, "test_accuracy", TARGET if target is None else target)


def test_mean_and_sample_deviation() -> None:
    """0.80, 0.84 and 0.70: the mean is 0.78, the squares of 0.02, 0.06 and −0.08 add up to 0.0104, over n − 1 = 2."""
    a = made()[0]

    assert a.mean == pytest.approx(0.78, abs=1e-12)
    assert a.sd == pytest.approx(math.sqrt(0.0104 / 2), abs=1e-12)
    assert (a.mean_of_last_10, a.sd_of_last_10) == pytest.approx((0.6, 0.1), abs=1e-12)
    assert a.best == pytest.approx(0.88, abs=1e-12)
    assert (a.seeds, a.finished, a.megabytes, a.client_failures) == (3, 3, 6.0, 3)


def test_differences_are_taken_seed_by_seed() -> None:
    """b − a is 0.10 and 0.12 where both finished; the difference of the means, 0.86 − 0.78, would be 0.08."""
    a, b = made()

    assert (a.difference, a.difference_sd, a.pairs) == (None, None, 0)
    assert b.difference == pytest.approx(0.11, abs=1e-12)
    assert b.difference_sd == pytest.approx(math.sqrt(2 * 0.01**2), abs=1e-12)
    assert (b.pairs, b.finished, b.seeds) == (2, 2, 3)
    assert b.difference_of_last_10 is None


def test_who_did_not_reach_the_target_is_not_averaged_but_shown() -> None:
    a, b = made()

    assert (a.rounds_to_target, a.megabytes_to_target, a.reached) == (15.0, 4.5, 2)
    assert a.rounds_to_target_sd == pytest.approx(math.sqrt(50), abs=1e-12)
    assert texts(a)[3:] == ["≥ 15.0 (2/3)", "≥ 4.5"]
    assert texts(b)[3:] == ["12.0 (2/2)", "3.0"]


def test_nobody_reached_it() -> None:
    never = {("a", seed): run(0.5) for seed in range(2)}
    (row,) = rows(["a"], range(2), never, "test_accuracy", TARGET)

    assert (row.reached, row.rounds_to_target, row.megabytes_to_target) == (0, None, None)
    assert texts(row)[3:] == ["– (0/2)", "–"]


def test_what_is_missing_is_said() -> None:
    a, b = made()
    (none,) = rows(["c"], range(3), CELLS, "test_accuracy", TARGET)

    assert texts(a)[:3] == ["a", "0.7800 ± 0.0721", "–"]
    assert texts(b)[:3] == ["b", "0.8600 ± 0.0566 (2/3 seeds)", "+0.1100 ± 0.0141"]
    assert texts(none) == ["c", "– (0/3 seeds)", "–", "– (0/0)", "–"]


def test_one_seed_has_no_deviation() -> None:
    a, b = made(seeds=1)

    assert (a.sd, b.difference_sd) == (None, None)
    assert texts(b)[1:3] == ["0.9000", "+0.1000"]


def test_without_a_target_there_are_no_such_columns() -> None:
    row = made(target={})[0]

    assert (row.target, row.reached, row.rounds_to_target) == (None, 0, None)
    assert headings("test_accuracy", {}) == ["strategy", "accuracy", "difference"]
    assert len(texts(row)) == 3
    assert headings("test_accuracy", TARGET)[3:] == ["rounds to 0.8", "MB to 0.8"]


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


def test_few_seeds_allow_no_test() -> None:
    """The smallest p of a two-sided sign test: all n differences on one side, 2 · (1/2)ⁿ."""
    assert on_significance(3).startswith("Too few seeds") and "with 3 seeds is 2/2^3 = 0.25" in on_significance(3)
    assert "2/2^5 = 0.062" in on_significance(5) and on_significance(5).startswith("Too few seeds")
    assert "Too few" not in on_significance(6) and "= 0.031" in on_significance(6)
