"""Means over clients, a portion at a time."""

from __future__ import annotations

import math

import pytest

from shoal.server.fleet import Report
from shoal.server.spread import Spread

VALUES, EXAMPLES = [0.1] * 10 + [0.7, -3.0, 1e3, 1.0, -1e3], [*range(1, 16)]
REPORTS = [
    Report(str(n), {"x": v, "examples": float(e)}) for n, (v, e) in enumerate(zip(VALUES, EXAMPLES, strict=True))
]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_portions_come_to_what_the_whole_does(size: int) -> None:
    spread = Spread()
    for start in range(0, len(REPORTS), size):
        spread.add(REPORTS[start : start + size])
    line = spread.line()

    assert line.keys() == {"clients_x", "clients_x_weighted", "clients_x_min", "clients_x_max"}
    assert (line["clients_x_min"], line["clients_x_max"]) == (-1e3, 1e3)
    assert line["clients_x"] == pytest.approx(-0.3 / 15, rel=1e-12)
    weighted = math.fsum(v * e for v, e in zip(VALUES, EXAMPLES, strict=True)) / sum(EXAMPLES)
    assert line["clients_x_weighted"] == pytest.approx(weighted, rel=1e-12)


def test_one_portion_is_exact() -> None:
    spread = Spread()
    spread.add(REPORTS[:10])

    assert spread.line()["clients_x"] == 0.1
    assert spread.line()["clients_x_weighted"] == pytest.approx(0.1, rel=1e-15)


def test_nobody_is_nothing() -> None:
    spread = Spread()
    spread.add([])

    assert spread.line() == {}


def test_a_device_that_leaves_numbers_out_disturbs_nobody() -> None:
    spread = Spread()
    spread.add([Report("a", {"x": 4.0}), Report("b", {"examples": 2.0, "x": 1.0}), Report("c", {"y": 5.0})])
    line = spread.line()

    assert (line["clients_x"], line["clients_x_weighted"]) == (2.5, 1.0)
    assert (line["clients_y"], line["clients_y_max"]) == (5.0, 5.0)
    assert "clients_y_weighted" not in line


@pytest.mark.parametrize("examples", [1.0, 1e10])
def test_numbers_beyond_all_bounds_end_nothing(examples: float) -> None:
    spread = Spread()
    for signs in ((1, 1), (1, -1)):
        spread.add([Report(str(sign), {"loss": 1.5e308 * sign, "examples": examples}) for sign in signs])
    line = spread.line()

    assert (line["clients_loss_min"], line["clients_loss_max"]) == (-1.5e308, 1.5e308)
    assert not math.isfinite(line["clients_loss"]) and not math.isfinite(line["clients_loss_weighted"])
