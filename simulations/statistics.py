"""The statistics behind a comparison: intervals, exact paired tests, Holm's correction, times that were not reached.

Everything is over seeds, one value a run. scipy does the distributions and the enumeration; it takes a second to
import, so it is imported where it is used. ``docs/comparing.md`` says what one may conclude from which number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pvariance, stdev

__all__ = ["ALPHA", "Fairness", "Interval", "Times", "holm", "mean", "seeds_needed", "sign_flip", "smallest_p"]

ALPHA = 0.05  # below which an adjusted p counts; intervals have the level 1 - ALPHA
EXACT = 15  # pairs, up to which all 2^n signs are enumerated; beyond, DRAWS of them at random
DRAWS = 99_999


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, the sample standard deviation (n − 1), and the mean's 95 % confidence interval (Student's t).

    None where there are too few values: one has no deviation, none has no mean. Infinite where they are no float.
    """

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(len(values), mean(values), None, None, None)
        from scipy.stats import t

        middle, sd = _or_infinite(fmean, values), _or_infinite(stdev, values)
        half = float(t.ppf(1 - ALPHA / 2, len(values) - 1)) * sd / math.sqrt(len(values))
        if math.isinf(half):
            return cls(len(values), middle, sd, -math.inf, math.inf)
        return cls(len(values), middle, sd, middle - half, middle + half)


def mean(values: Sequence[float]) -> float | None:
    """That of an :class:`Interval`, without one."""
    if len(values) < 2:
        return fmean(values) if values else None
    return _or_infinite(fmean, values)


def _or_infinite(of: Callable[[Sequence[float]], float], values: Sequence[float]) -> float:
    """What runs that diverge come to is beyond all numbers, which Python's own statistics do not bear."""
    try:
        return of(values) if all(map(math.isfinite, values)) else math.inf
    except OverflowError:
        return math.inf


# --- tests -----------------------------------------------------------------------------------------------------------


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the paired permutation test: how often random signs move the mean as far from 0 (Fisher 1935).

    Exact up to 15 pairs; beyond, from 99,999 random sign vectors and the observed one (Phipson and Smyth 2010).
    """
    import numpy as np
    from scipy.stats import permutation_test

    if len(differences) < 2:
        return smallest_p(len(differences))
    # Given one sample of pairs, scipy permutes by signs.
    draws = np.inf if len(differences) <= EXACT else DRAWS
    settings = {"permutation_type": "samples", "n_resamples": draws, "batch": 10_000, "rng": 0}
    found = permutation_test((differences,), np.mean, **settings)
    return float(found.pvalue)


def smallest_p(pairs: int) -> float:
    """The least two-sided p that so many pairs can give: all of them on one side."""
    return min(1.0, 2.0 * 0.5**pairs)


def seeds_needed(comparisons: int) -> int:
    """The fewest pairs with which one of so many comparisons can be significant after :func:`holm`."""
    return next(pairs for pairs in range(1, 1024) if comparisons * smallest_p(pairs) <= ALPHA)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: below ALPHA where Holm's step-down procedure (1979) rejects."""
    adjusted, least = [1.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = least
    return adjusted


# --- times to a target -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """What runs needed until a target, where some may never have reached it.

    ``restricted`` is the mean of what was spent until the target or, by runs that missed it, in all: the restricted
    mean of survival analysis (Royston and Parmar 2013), a lower bound of the mean. ``median`` is None unless more than
    half reached the target.
    """

    reached: int
    restricted: Interval
    median: float | None

    @classmethod
    def of(cls, until: Sequence[float | None], in_all: Sequence[float]) -> Times:
        """``until`` is what each run had spent at the target, None if it missed it; ``in_all`` what it spent."""
        spent = [most if time is None else time for time, most in zip(until, in_all, strict=True)]
        half = median([math.inf if time is None else time for time in until]) if until else math.inf
        reached = sum(time is not None for time in until)
        return cls(reached, Interval.of(spent), half if math.isfinite(half) else None)


# --- clients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fairness:
    """How a metric is spread over the clients of one run, in the terms of q-FFL (Li et al. 2020).

    ``mean`` counts clients alike, ``weighted`` by their examples; ``variance`` divides by their number: they are the
    population. ``worst_10`` and ``best_10`` are means over a tenth of the clients, rounded up.
    """

    clients: int
    mean: float
    weighted: float | None
    variance: float
    worst_10: float
    best_10: float

    @classmethod
    def of(cls, values: Sequence[float], examples: Sequence[float], lower_is_better: bool = False) -> Fairness:
        """ValueError without a client."""
        ranked, tenth = sorted(values, reverse=lower_is_better), -(-len(values) // 10)
        total = math.fsum(examples)
        products = [v * n for v, n in zip(values, examples, strict=True)]
        weighted = _or_infinite(math.fsum, products) / total if total else None
        worst, best = _or_infinite(fmean, ranked[:tenth]), _or_infinite(fmean, ranked[-tenth:])
        return cls(len(values), _or_infinite(fmean, values), weighted, _or_infinite(pvariance, values), worst, best)
