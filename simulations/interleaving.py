"""Clients that draw row by row, in random order, from what is left of each class."""

from __future__ import annotations

import numpy as np

__all__ = ["interleave"]


def interleave(per_class: np.ndarray, sizes: np.ndarray, mixes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many rows ``[N, C]`` of each class N clients have once each has drawn ``sizes`` ``[N]``.

    One client after the other, at random among those that are not full, draws a class by its line of ``mixes``
    ``[N, C]`` among those that are not used up; all at once, up to the draw that uses a class up.
    """
    left, mixes = per_class.copy(), mixes.copy()
    counts = np.zeros(mixes.shape, np.int64)
    turns = _turns(sizes, rng)
    while len(turns):
        mixes[:, left == 0] = 0
        wanting = mixes.sum(1) == 0
        mixes[wanting] = left  # all the classes it wants are used up
        bounds = np.cumsum(mixes, axis=1)
        drawn = (rng.random(len(turns)) * bounds[turns, -1] >= bounds.T[:-1, turns]).sum(0)
        over = _rank(drawn) >= left[drawn]
        good = int(over.argmax()) if over.any() else len(turns)
        np.add.at(counts, (turns[:good], drawn[:good]), 1)
        left -= np.bincount(drawn[:good], minlength=len(left))
        turns = turns[good:]
    return counts


def _turns(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whose turn it is: each time one of those that are not full, at random."""
    left, parts = sizes.copy(), list[np.ndarray]()
    while left.any():
        drawn = rng.choice(np.flatnonzero(left), left.sum())
        kept = drawn[_rank(drawn) < left[drawn]]
        parts.append(kept)
        left = left - np.bincount(kept, minlength=len(left))
    return np.concatenate(parts)


def _rank(values: np.ndarray) -> np.ndarray:
    """How often each value came before."""
    order = np.argsort(values, kind="stable")
    sizes = np.bincount(values)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank
