"""Generated data sets against the recipes of their papers."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.protos.errors import ExperimentError
from shoal.simulations import synthetic as module
from shoal.simulations.datasets import load
from shoal.simulations.synthetic import fcube, synthetic


def test_synthetic_is_that_of_the_authors_generator() -> None:
    """30 devices of at least 50 examples, variances j^−1.2; the same draw twice, another one else."""
    data, again, other = synthetic(draw=0), synthetic(draw=0), synthetic(draw=1)
    assert data.clients is not None
    names, sizes = np.unique(data.clients, return_counts=True)

    assert len(names) == 30 and sizes.min() >= 50 and data.x.shape[1] == 60
    assert data.y.min() >= 0 and data.y.max() < 10
    largest = data.x[data.clients == names[sizes.argmax()]]
    assert np.allclose(largest.var(0), np.arange(1, 61) ** -1.2, rtol=0.5)
    assert np.array_equal(data.x, again.x) and not np.array_equal(data.x[:50], other.x[:50])


@pytest.mark.slow
def test_synthetic_sizes_are_lognormal() -> None:
    data = synthetic(clients=150, draw=3)
    assert data.clients is not None
    sizes = np.unique(data.clients, return_counts=True)[1]

    logs = np.log(sizes[sizes > 50] - 50 + 0.5)  # what is drawn is rounded down
    assert logs.mean() == pytest.approx(4, abs=0.5) and logs.std() == pytest.approx(2, abs=0.35)


@pytest.mark.slow
def test_beta_moves_features_and_iid_shares_one_model() -> None:
    def spread(beta: float) -> float:
        data = synthetic(0.0, beta, clients=40)
        return float(np.std([data.x[data.clients == f"d{n}"].mean() for n in range(40)]))

    assert spread(0.0) < 0.3 and spread(3.0) == pytest.approx(3, rel=0.4)  # Bₖ ~ N(0, β²)
    iid = synthetic(iid=True, draw=2)
    assert np.abs(iid.x.mean(0)).max() < 0.1
    design = np.hstack([iid.x, np.ones((len(iid.x), 1), np.float32)])
    fitted = np.linalg.lstsq(design, np.eye(10)[iid.y], rcond=None)[0]
    assert ((design @ fitted).argmax(1) == iid.y).mean() > 0.6  # one linear rule explains every client


def test_fcube_parties_hold_opposite_octants() -> None:
    train, test = fcube(draw=0)
    assert train.clients is not None

    assert sorted(set(train.clients)) == ["0", "1", "2", "3"] and (len(train), len(test)) == (4000, 1000)
    for party in set(train.clients):
        first, second = {tuple(row) for row in (train.x[train.clients == party] > 0).tolist()}
        assert all(a != b for a, b in zip(first, second, strict=True))
    for part in (train, test):
        assert ((part.x[:, 0] > 0) == part.y).all() and np.abs(part.x).max() <= 1


def test_arguments_are_checked() -> None:
    with pytest.raises(ExperimentError, match=r"'data.beta' is -1"):
        load("synthetic", beta=-1.0)
    with pytest.raises(ExperimentError, match=r"'data.draw' is 0.5"):
        load("fcube", draw=0.5)


def test_public_names_are_sorted() -> None:
    assert module.__all__ == sorted(module.__all__)
