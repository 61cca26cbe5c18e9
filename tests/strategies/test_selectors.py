"""Who is asked: every set of clients is equally likely, and a large population costs what its cohort costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import overload

import numpy as np
import pytest

from shoal.strategies.selectors import Uniform

NAMES = [f"client-{i}" for i in range(20)]


def select(population: Sequence[str], count: int, seed: int = 0) -> Sequence[str]:
    return Uniform().select(Uniform().init(), population, count, 0, np.random.default_rng(seed))


class Lazy(Sequence[str]):
    """A population that is computed on demand and counts how often it is asked."""

    def __init__(self, size: int) -> None:
        self.size, self.reads = size, 0

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        assert not isinstance(index, slice)
        self.reads += 1
        return f"client-{range(self.size)[index]}"


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_without_replacement(count: int) -> None:
    for seed in range(20):
        cohort = select(NAMES, count, seed)
        assert len(cohort) == len(set(cohort)) == count
        assert set(cohort) <= set(NAMES)


def test_the_generator_alone_decides() -> None:
    assert select(NAMES, 5, seed=3) == select(NAMES, 5, seed=3)
    assert select(NAMES, 5, seed=3) != select(NAMES, 5, seed=4)
    rng = np.random.default_rng(3)
    first, second = (Uniform().select({}, NAMES, 5, r, rng) for r in (0, 1))
    assert first != second


def test_each_client_is_equally_likely() -> None:
    """4000 cohorts of 5 of 20. Counts O with expectation 1000 and variance 4000 · ¼ · ¾ = 750, correlated by the fixed
    size: Σ (O − 1000)² / 750 · 19/20 is χ² with 19 degrees of freedom, below 43.82 in 999 of 1000 draws.
    """
    rng = np.random.default_rng(0)
    drawn = Counter(name for r in range(4000) for name in Uniform().select({}, NAMES, 5, r, rng))
    assert sum((drawn[name] - 1000) ** 2 for name in NAMES) / 750 * 19 / 20 < 43.82


def test_each_set_is_equally_likely() -> None:
    """4000 pairs of 5: ten sets, each expected 400 times; χ² with 9 degrees of freedom, 27.88 at 1 in 1000."""
    rng = np.random.default_rng(1)
    drawn = Counter(frozenset(Uniform().select({}, NAMES[:5], 2, r, rng)) for r in range(4000))
    assert sum((drawn[frozenset(pair)] - 400) ** 2 for pair in combinations(NAMES[:5], 2)) / 400 < 27.88


def test_each_place_in_the_cohort_is_equally_likely() -> None:
    """The order is drawn too, so the round's sum favours no client: 4000 times who stands first of all 20, each
    expected 200 times; χ² with 19 degrees of freedom.
    """
    rng = np.random.default_rng(2)
    drawn = Counter(Uniform().select({}, NAMES, 20, r, rng)[0] for r in range(4000))
    assert sum((drawn[name] - 200) ** 2 for name in NAMES) / 200 < 43.82


def test_a_million_clients_cost_their_cohort() -> None:
    population = Lazy(1_000_000)
    cohort = select(population, 100)
    assert population.reads == 100
    assert len(set(cohort)) == 100
    assert any(int(name.removeprefix("client-")) > 500_000 for name in cohort)


def test_it_learns_nothing() -> None:
    assert Uniform().observe(Uniform().init(), {"client-1": {"loss": 2.0}}) == {}


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="larger sample than population"):
        select(NAMES, 21)
