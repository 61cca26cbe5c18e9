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


class LeafSum:
    """Collects parts in any order and sums them in the fixed one.

    A part is the contribution of one position, or the sum of several from the first position of a leaf on.
    """

    def __init__(self) -> None:
        self._parts: dict[int, Contribution] = {}

    def add(self, position: int, part: Contribution) -> None:
        """Take the part that begins at this cohort position; ValueError if there is one already."""
        if position in self._parts:
            raise ValueError(f"cohort position {position} was added twice")
        self._parts[position] = part

    def total(self) -> Contribution | None:
        """The sum of all parts; None if there are none."""
        leaves: dict[int, list[Contribution]] = {}
        for position in sorted(self._parts):
            leaves.setdefault(position // LEAF, []).append(self._parts[position])
        sums = (add_up(parts) for parts in leaves.values())
        return add_up(leaf for leaf in sums if leaf is not None)
