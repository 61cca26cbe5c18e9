"""What many clients' numbers come to, told a portion at a time: memory does not depend on how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from shoal.server.fleet import Report

__all__ = ["Spread"]


class Spread:
    """Of each number: the uniform mean, the mean weighted by examples, the lowest and the highest."""

    def __init__(self) -> None:
        self._numbers: dict[str, _Number] = {}

    def add(self, reports: Sequence[Report]) -> None:
        """Some more clients, who report their ``examples`` and other numbers; devices may leave some out."""
        for name in dict.fromkeys(name for report in reports for name in report.numbers if name != "examples"):
            having = [report.numbers for report in reports if name in report.numbers]
            values, weights = ([numbers.get(what, 0.0) for numbers in having] for what in (name, "examples"))
            self._numbers.setdefault(name, _Number()).add(values, weights)

    def line(self) -> dict[str, float]:
        """For a round's line of metrics; empty if nobody reported anything."""
        found = dict[str, float]()
        for name, number in self._numbers.items():
            found[f"clients_{name}"] = number.sum / number.count
            if number.weight > 0:
                found[f"clients_{name}_weighted"] = number.weighted / number.weight
            found[f"clients_{name}_min"], found[f"clients_{name}_max"] = number.lowest, number.highest
        return found


class _Number:
    def __init__(self) -> None:
        self.count, self.sum, self.weight, self.weighted = 0, 0.0, 0.0, 0.0
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, values: Sequence[float], weights: Sequence[float]) -> None:
        self.count += len(values)
        self.sum += _sum(values)
        self.weight += _sum(weights)
        self.weighted += _sum(list(map(mul, values, weights)))
        self.lowest, self.highest = min(self.lowest, *values), max(self.highest, *values)


def _sum(numbers: Sequence[float]) -> float:
    """Not finite where that is so: a client may say what it likes, and must not end the run by it."""
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):
        return sum(numbers)
