"""The round's sum, in an order that depends on nothing but the cohort.

Floating-point addition is not associative, so the order is fixed: *leaves* of 16 cohort positions, each summed from its
first position to its last, then the leaves in order. Workers and cluster nodes take whole leaves; so the number
of workers, the order of arrival and a crash leave no trace in the bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.protos.errors import RoundError
from shoal.strategies.base import Context, Scaled, State, Strategy, Terms, Update

__all__ = ["LEAF", "Carried", "Contribution", "LeafSum", "RunningSum", "add_up", "carry", "contribute", "contributions"]

LEAF = 16
Term = Tensor | float | Scaled


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


def contributions(strategy: Strategy, state: State, update: Update, context: Context) -> list[Contribution]:
    """Those of a block of K clients, in its order."""
    examples: Any = update.examples  # [K, 1]
    block = strategy.contribute(state, update, context)
    terms = {name: _rows(value, len(examples)) for name, value in block.items()}
    buffers = None if update.buffers is None else update.buffers * examples
    return [
        Contribution(
            {name: rows[k] for name, rows in terms.items()},
            None if buffers is None else buffers[k],
            None if update.counters is None else update.counters[k],
            float(examples[k]),
        )
        for k in range(len(examples))
    ]


def _rows(value: Term, count: int) -> Sequence[Term]:
    """A block's term for each client: a column of numbers becomes numbers."""
    if isinstance(value, Scaled):
        return [Scaled(*pair) for pair in zip(value.vector, _rows(value.by, count), strict=True)]  # type: ignore[arg-type]
    if not isinstance(value, Tensor):
        return [value] * count
    return value.unbind() if value.shape[1] > 1 else value.squeeze(1).tolist()


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


class RunningSum:
    """A sum from left to right, in memory of its own: what is added is neither changed nor kept."""

    def __init__(self) -> None:
        self._terms: dict[str, Term] | None = None
        self._buffers: Tensor | None = None
        self._counters: Tensor | None = None
        self._examples, self._counted = 0.0, 0

    def add(self, part: Contribution) -> None:
        """KeyError if the parts of one round name different terms."""
        if self._terms is None:
            self._terms = {name: _copy(value) for name, value in part.terms.items()}
            self._buffers = None if part.buffers is None else part.buffers.clone()
            self._counters = part.counters
        else:
            _check_alike(self._terms, part.terms)
            for name, value in self._terms.items():
                self._terms[name] = _added(value, part.terms[name])
            if (self._buffers is None) != (part.buffers is None) or (self._counters is None) != (part.counters is None):
                raise KeyError("contributions of one round must all bring buffers and counters, or none")
            if self._buffers is not None and part.buffers is not None:
                self._buffers.add_(part.buffers)
            if self._counters is not None and part.counters is not None:
                self._counters = torch.maximum(self._counters, part.counters)
        self._examples, self._counted = self._examples + part.examples, self._counted + part.counted

    @property
    def total(self) -> Contribution | None:
        """What has been added so far, not to be kept while more is added; None if nothing was."""
        if self._terms is None:
            return None
        return Contribution(self._terms, self._buffers, self._counters, self._examples, self._counted)


def _check_alike(a: Terms, b: Terms) -> None:
    if a.keys() != b.keys():
        raise KeyError(f"contributions of one round name different terms: {sorted(a)} and {sorted(b)}")


def add_up(parts: Iterable[Contribution]) -> Contribution | None:
    """Left to right; None if there are none."""
    running = RunningSum()
    for part in parts:
        running.add(part)
    return running.total


def _copy(value: Term) -> Tensor | float:
    if isinstance(value, Scaled):
        return value.vector * value.by
    return value.clone() if isinstance(value, Tensor) else value


def _added(a: Term, b: Term) -> Term:
    """In the memory of ``a``, if that is a vector."""
    if isinstance(a, Tensor):
        return a.add_(b.vector, alpha=float(b.by)) if isinstance(b, Scaled) else a.add_(b)
    return a + b  # type: ignore[operator]  # numbers, as their first was


class _Folded:
    """A sum as far as it goes: the leaves before ``number``, and that leaf as far as it goes."""

    def __init__(self) -> None:
        self._before, self._number, self._leaf = RunningSum(), 0, RunningSum()

    def add(self, position: int, part: Contribution | None) -> None:
        if part is None:
            return
        if position // LEAF != self._number:
            self._close()
            self._number = position // LEAF
        self._leaf.add(part)

    def _close(self) -> None:
        if self._before.total is None:
            self._before, self._leaf = self._leaf, RunningSum()
        elif self._leaf.total is not None:
            self._before.add(self._leaf.total)
            self._leaf = RunningSum()

    def total(self, beyond: Iterable[tuple[int, Contribution | None]]) -> Contribution | None:
        """With some parts ``beyond``, which are not kept."""
        going_on = _Folded()
        going_on._number = self._number
        for running, kept in ((going_on._before, self._before), (going_on._leaf, self._leaf)):
            if kept.total is not None:
                running.add(kept.total)
        for position, part in beyond:
            going_on.add(position, part)
        going_on._close()
        return going_on._before.total


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
            self._folded.add(self._next, found)
            self._next += size

    def total(self) -> Contribution | None:
        """The sum of the parts there are, also where positions are missing; None if there are none."""
        waiting = sorted(self._waiting.items(), key=lambda item: item[0])
        return self._folded.total((position, part) for position, (_, part) in waiting)
