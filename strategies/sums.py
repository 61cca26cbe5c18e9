"""The round's sum, in an order that depends on nothing but the cohort.

Floating-point addition is not associative, so the order is fixed: *leaves* of 16 cohort positions, each summed from its
first position to its last, then the leaves in order. Workers and cluster nodes take whole leaves; so the number
of workers, the order of arrival and a crash leave no trace in the bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.protos.errors import RoundError
from shoal.strategies.base import Context, State, Strategy, Terms, Update

__all__ = ["LEAF", "Carried", "Contribution", "LeafSum", "add_up", "carry", "contribute", "plus"]

LEAF = 16


@dataclass(frozen=True)
class Carried:
    """What travels beside a strategy's vectors, the same for all: ``buffers`` ``[B]`` and ``counters`` ``[C]``."""

    buffers: Tensor
    counters: Tensor


@dataclass(frozen=True)
class Contribution:
    """What one update, or the sum of several, adds to a round.

    ``terms`` are the strategy's own. The rest is the platform's, the same for every strategy: ``buffers`` is Σ nₖ bₖ,
    ``counters`` the maximum, ``examples`` Σ nₖ, ``counted`` the number of updates.
    """

    terms: Terms
    buffers: Tensor | None
    counters: Tensor | None
    examples: float
    counted: int = 1


def contribute(strategy: Strategy, state: State, update: Update, context: Context) -> Contribution:
    """One client's contribution; ``update`` has passed ``check_update``."""
    examples = float(update.examples)
    return Contribution(
        strategy.contribute(state, update, context),
        None if update.buffers is None else update.buffers * examples,
        update.counters,
        examples,
    )


def carry(carried: Carried, total: Contribution) -> Carried:
    """The next round's buffers (their example-weighted mean) and counters (their maximum)."""
    buffers, counters = total.buffers, total.counters
    if buffers is not None and not (math.isfinite(total.examples) and total.examples > 0):
        raise RoundError(
            f"the counted clients report {total.examples:g} examples, but the model's buffers are averaged by "
            f"examples; clients must report a positive number of them"
        )
    return Carried(
        carried.buffers if buffers is None else buffers / total.examples,
        carried.counters if counters is None else counters,
    )


def plus(a: Contribution, b: Contribution) -> Contribution:
    """Their sum; KeyError if they name different terms."""
    if a.terms.keys() != b.terms.keys():
        raise KeyError(f"contributions of one round name different terms: {sorted(a.terms)} and {sorted(b.terms)}")
    if (a.buffers is None) != (b.buffers is None) or (a.counters is None) != (b.counters is None):
        raise KeyError("contributions of one round must all bring buffers and counters, or none")
    return Contribution(
        {name: a.terms[name] + b.terms[name] for name in a.terms},
        None if a.buffers is None or b.buffers is None else a.buffers + b.buffers,
        None if a.counters is None or b.counters is None else torch.maximum(a.counters, b.counters),
        a.examples + b.examples,
        a.counted + b.counted,
    )


def add_up(parts: Iterable[Contribution]) -> Contribution | None:
    """Left to right; None if there are none."""
    total: Contribution | None = None
    for part in parts:
        total = part if total is None else plus(total, part)
    return total


@dataclass(frozen=True)
class _Folded:
    """A sum as far as it goes: the leaves before ``number``, and that leaf as far as it goes."""

    before: Contribution | None = None
    number: int = 0
    leaf: Contribution | None = None

    def add(self, position: int, part: Contribution | None) -> _Folded:
        if part is None:
            return self
        if self.leaf is None or position // LEAF != self.number:
            return _Folded(self.total(), position // LEAF, part)
        return _Folded(self.before, self.number, plus(self.leaf, part))

    def total(self) -> Contribution | None:
        if self.before is None or self.leaf is None:
            return self.leaf
        return plus(self.before, self.leaf)


class LeafSum:
    """Collects parts in any order and sums them in the fixed one, each as soon as all before it are there.

    A part is the contribution of one position, or the sum of several from the first position of a leaf on. Parts that
    come in order take no memory beyond the sum itself.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, Contribution | None]] = {}
        self._next, self._folded = 0, _Folded()

    def add(self, position: int, part: Contribution | None, size: int = 1) -> None:
        """Take the part of ``size`` positions from this one on, None if all of them failed.

        ValueError if there is one already.
        """
        if position in self._waiting or position < self._next:
            raise ValueError(f"cohort position {position} was added twice")
        self._waiting[position] = size, part
        while self._next in self._waiting:
            size, found = self._waiting.pop(self._next)
            self._folded = self._folded.add(self._next, found)
            self._next += size

    def total(self) -> Contribution | None:
        """The sum of the parts there are, also where positions are missing; None if there are none."""
        folded = self._folded
        for position, (_, part) in sorted(self._waiting.items(), key=lambda item: item[0]):
            folded = folded.add(position, part)
        return folded.total()
