"""The weighted mean, and the weights that make none."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.protos.errors import RoundError
from shoal.strategies.base import Update, number, vector
from shoal.strategies.mean import WeightedMean

UPDATES = [Update(torch.tensor([1.0, -2.0]), 30.0), Update(torch.tensor([5.0, 2.0]), 10.0)]


def mean_of(mean: WeightedMean, updates: list[Update]) -> torch.Tensor:
    terms = [mean.contribute(update) for update in updates]
    weights = [number(term, "weight") for term in terms]
    return mean.finish({"delta": torch.stack([vector(term, "delta") for term in terms]).sum(0), "weight": sum(weights)})


def test_by_examples() -> None:
    """(30 · 1 + 10 · 5) / 40 = 2 and (−60 + 20) / 40 = −1."""
    assert mean_of(WeightedMean(), UPDATES).tolist() == [2.0, -1.0]


def test_uniform() -> None:
    assert mean_of(WeightedMean("uniform"), UPDATES).tolist() == [3.0, 0.0]


def test_a_client_without_examples_has_no_say() -> None:
    assert mean_of(WeightedMean(), [*UPDATES, Update(torch.tensor([1e9, 1e9]), 0.0)]).tolist() == [2.0, -1.0]


def test_a_common_factor_of_the_weights_does_not_matter() -> None:
    eighth = [Update(u.delta, u.examples / 8) for u in UPDATES]
    assert torch.equal(mean_of(WeightedMean(), eighth), mean_of(WeightedMean(), UPDATES))


def test_the_dtype_stays() -> None:
    for dtype in (torch.float32, torch.float64):
        delta = torch.ones(2, dtype=dtype)
        assert mean_of(WeightedMean(), [Update(delta, 3.0)]).dtype is dtype


def test_by_examples_is_the_default() -> None:
    assert WeightedMean() == WeightedMean("examples")


@pytest.mark.parametrize("weight", [0.0, -0.0, -3.0, math.nan, math.inf, -math.inf])
def test_weights_that_make_no_mean(weight: float) -> None:
    """The error says what the sum was and both ways out."""
    with pytest.raises(RoundError) as error:
        WeightedMean.finish({"delta": torch.ones(2), "weight": weight})
    assert f"sum to {weight}" in str(error.value)
    assert "positive number of examples" in str(error.value)
    assert "strategy.weighting = 'uniform'" in str(error.value)


@pytest.mark.parametrize("weight", [0.0, -3.0, math.nan, math.inf])
def test_weights_in_a_tensor_are_checked_too(weight: float) -> None:
    """Engines may hand numbers over as tensors, as a block does."""
    with pytest.raises(RoundError):
        WeightedMean.finish({"delta": torch.zeros(2), "weight": torch.tensor([weight])})
