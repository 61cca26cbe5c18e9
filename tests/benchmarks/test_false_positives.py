"""The error rates that ``shoal compare`` promises, on cells that are made up; the benchmark has real ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.false_positives import experiment, level, measure, power, summary
from shoal.simulations.comparison import rows
from shoal.simulations.statistics import ALPHA, sign_flip


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [6, 8])
def test_the_rate_of_false_positives_is_exact(pairs: int) -> None:
    """Whatever the differences: of all signs that chance may give them the test rejects its nominal share."""
    sizes = np.random.default_rng(pairs).exponential(size=pairs)
    ps = [sign_flip((sizes * signs).tolist()) for signs in itertools.product([1, -1], repeat=pairs)]

    assert np.mean(np.array(ps) <= ALPHA) == level(pairs) <= ALPHA


def test_the_level_and_the_power_of_theory() -> None:
    """12 of 256 signs with eight pairs; the power beside that of 100,000 t-tests."""
    rng = np.random.default_rng(0)
    draws = rng.normal(1.2, 1.0, (100_000, 8))
    t = draws.mean(1) / (draws.std(1, ddof=1) / 8**0.5)

    assert (level(6), level(8)) == (2 / 64, 12 / 256)
    assert power(1.2, 8) == pytest.approx(np.mean(abs(t) > stats.t.ppf(1 - level(8) / 2, 7)), abs=0.006)


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_and_what_is_there_is_found() -> None:
    """Two hundred comparisons of normal values: false positives within what chance allows, power as theory has it."""
    values = np.random.default_rng(1).normal(size=(200, 2, 8))
    found = summary(values, "test_loss", [1.2])["effects"]

    assert stats.binomtest(found["0"]["found"], 200, level(8), alternative="greater").pvalue > 0.01
    assert stats.binomtest(found["1.2"]["found"], 200, power(1.2, 8)).pvalue > 0.01


@pytest.mark.slow
def test_holm_keeps_the_rate_of_a_whole_table() -> None:
    """Three arms that all equal the first, which they share: any finding at all is a false one."""
    rng, spent = np.random.default_rng(2), {"bytes_up": 0, "bytes_down": 0, "seconds": 0, "failed": 0, "rounds": 1}
    wrong = 0
    for _ in range(100):
        runs: dict[tuple[str, str, int], dict[str, Any]] = {
            ("", arm, seed): {**spent, "best": {}, "mean_of_last_10": {}, "last": {"test_loss": rng.normal()}}
            for arm in "abcd"
            for seed in range(8)
        }
        table = rows([""], list("abcd"), range(8), runs, "test_loss", {})
        wrong += any(row.p_holm is not None and row.p_holm <= ALPHA for row in table)

    assert stats.binomtest(wrong, 100, ALPHA, alternative="greater").pvalue > 0.01


@pytest.mark.slow
def test_the_benchmarks_runs_differ_by_their_seed_alone() -> None:
    made = experiment()

    assert measure(made, 1) == measure(made, 1) != measure(made, 2)
