"""The statistics against published numbers, scipy's other routes to them, and counting by hand."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from shoal.simulations.statistics import (
    ALPHA,
    Fairness,
    Interval,
    Times,
    holm,
    seeds_needed,
    sign_flip,
    smallest_p,
)

# Darwin's maize, eighths of an inch, cross- minus self-fertilised (Fisher 1935, The Design of Experiments, section 21).
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Extra hours of sleep of ten patients under two drugs, second minus first (Student 1908, The probable error of a mean).
STUDENT = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_the_interval_is_students() -> None:
    """R's paired t.test of its 'sleep' data: mean 1.58, t = 4.0621, 95 %: 0.7001142 to 2.4598858."""
    found = Interval.of(STUDENT)

    assert (found.n, found.mean) == (10, pytest.approx(1.58))
    assert found.sd is not None and 1.58 / (found.sd / math.sqrt(10)) == pytest.approx(4.0621, abs=5e-5)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-7), pytest.approx(2.4598858, abs=1e-7))


def test_few_values_have_no_interval() -> None:
    assert Interval.of([]) == Interval(0, None, None, None, None)
    assert Interval.of([0.5]) == Interval(1, 0.5, None, None, None)
    assert Interval.of([0.5, 0.5]) == Interval(2, 0.5, 0.0, 0.5, 0.5)


def test_what_diverges_is_infinite() -> None:
    assert Interval.of([1e308, 1e308]).mean == math.inf
    assert Interval.of([math.inf, 1.0]) == Interval(2, math.inf, math.inf, -math.inf, math.inf)
    assert Fairness.of([2.0**600, 3 * 2.0**600], [1.0, 1.0]).variance == math.inf
    assert Fairness.of([1e308, 1e308], [1.0, 1.0]).weighted == math.inf


def test_the_sign_flip_test_is_fishers() -> None:
    """Of the 32,768 sums 1,726 are as large as Darwin's, 863 on either side."""
    assert sign_flip(DARWIN) == 1726 / 2**15


@pytest.mark.parametrize("n", range(1, 9))
def test_the_sign_flip_test_counts_all_signs(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.5, 1.0, n)
    sums = [abs(float(np.dot(signs, differences))) for signs in itertools.product([1, -1], repeat=n)]

    assert sign_flip(differences.tolist()) == np.mean([s >= abs(differences.sum()) - 1e-12 for s in sums])


@pytest.mark.parametrize("seed", range(5))
def test_on_ranks_the_sign_flip_test_is_wilcoxons(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.3, 1.0, 9)
    signed = np.sign(differences) * stats.rankdata(abs(differences))

    assert sign_flip(signed.tolist()) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue, abs=1e-12)


def test_ties_and_zeros_are_no_evidence() -> None:
    assert sign_flip([0.0] * 8) == 1.0
    assert sign_flip([0.1 + 0.2, 0.3, -0.3]) == 1.0  # 0.1 + 0.2 is not 0.3 in binary: these sums are ties all the same
    assert sign_flip([0.25] * 6) == 2 / 2**6


@pytest.mark.slow
def test_many_pairs_are_drawn() -> None:
    """Twenty pairs by half a million signs of our own: two p's that are drawn differ by chance."""
    differences = np.random.default_rng(3).normal(0.4, 1.0, 20)
    p, signs = sign_flip(differences.tolist()), np.random.default_rng(4).choice([-1.0, 1.0], size=(500_000, 20))
    expected = float(np.mean(abs(signs @ differences) >= abs(differences.sum())))

    assert p == pytest.approx(expected, abs=4 * math.sqrt(expected / 99_999))
    assert sign_flip([1.0] * 40) == 2 / 100_000  # never 0: the signs observed are counted, too


def test_the_least_p_and_the_seeds_it_needs() -> None:
    """Six seeds for one comparison, seven for up to three, eight for up to six, nine for up to twelve."""
    assert [smallest_p(n) for n in (0, 1, 3, 5, 6)] == [1.0, 1.0, 0.25, 0.0625, 0.03125]
    assert [seeds_needed(m) for m in (1, 2, 3, 4, 6, 7, 12, 13)] == [6, 7, 7, 8, 8, 9, 9, 10]
    for n in (1, 5, 6, 8):
        assert smallest_p(n) == sign_flip([1.0] * n)
    for m in range(1, 40):
        n = seeds_needed(m)
        assert holm([smallest_p(n)] + [1.0] * (m - 1))[0] <= ALPHA < holm([smallest_p(n - 1)] + [1.0] * (m - 1))[0]


def test_holm_as_in_textbooks() -> None:
    """Four hypotheses with p = 0.01, 0.04, 0.03, 0.005: only the two smallest fall at 5 %."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_holm_rejects_as_the_step_down_procedure(seed: int) -> None:
    """Holm's own words: go on with the smallest p while it is at most α over the number of hypotheses that are left."""
    ps = np.random.default_rng(seed).beta(0.3, 2.0, 7)
    rejected, left = set[int](), list(np.argsort(ps))
    while left and ps[left[0]] <= ALPHA / len(left):
        rejected.add(int(left.pop(0)))

    assert {i for i, p in enumerate(holm(ps.tolist())) if p <= ALPHA} == rejected


def test_the_restricted_mean_is_the_area_under_kaplan_and_meiers_curve() -> None:
    times = [4.0, 7.0, None, 9.0, None, 12.0]
    censored = stats.CensoredData([4.0, 7.0, 9.0, 12.0], right=[20.0, 20.0])
    curve = stats.ecdf(censored).sf
    steps = np.concatenate([[0.0], curve.quantiles[curve.quantiles < 20], [20.0]])
    heights = np.concatenate([[1.0], curve.probabilities[curve.quantiles < 20]])
    found = Times.of(times, [20.0] * 6)

    assert found.restricted.mean == pytest.approx(float(np.sum(np.diff(steps) * heights)))
    assert (found.reached, found.median) == (4, 10.5)


def test_a_median_needs_more_than_half() -> None:
    assert Times.of([3.0, None, None], [9.0] * 3).median is None
    assert Times.of([3.0, 5.0, None, None], [9.0] * 4).median is None
    assert Times.of([3.0, 5.0, None], [9.0] * 3).median == 5.0
    assert Times.of([], []) == Times(0, Interval(0, None, None, None, None), None)
    assert Times.of([None, None], [9.0, 7.0]).restricted.mean == 8.0


def test_fairness_by_hand() -> None:
    """Eleven clients: a tenth of them, rounded up, is two."""
    values = [0.5, 0.9, 0.7, 0.6, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    found = Fairness.of(values, [10.0] * 10 + [100.0])

    assert (found.clients, found.mean) == (11, pytest.approx(0.7))
    assert found.variance == pytest.approx((0.2**2 + 0.2**2 + 0.1**2 + 0.1**2) / 11)
    assert (found.worst_10, found.best_10) == (pytest.approx(0.55), pytest.approx(0.85))
    assert found.weighted == pytest.approx((10 * sum(values[:10]) + 100 * 0.7) / 200)
    assert Fairness.of(values, [1.0] * 11, lower_is_better=True).worst_10 == pytest.approx(0.85)
    assert Fairness.of([0.5], [0.0]).weighted is None
    assert fmean(values) == found.mean
