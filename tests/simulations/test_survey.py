"""What is said of a split before anything is trained, by hand and against SciPy's definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.client.data import Shard
from shoal.simulations import survey as module
from shoal.simulations.datasets import from_arrays, from_shards
from shoal.simulations.federated import ArrayData, LazyData, Numbered
from shoal.simulations.label_skew import Dirichlet
from shoal.simulations.partitioners import Iid
from shoal.simulations.survey import Survey, survey

LABELS = np.repeat(np.arange(10), 60)
X = np.zeros((600, 1), np.float32)


def by_hand() -> Survey:
    shards = {"a": (np.zeros((2, 1)), [0, 0]), "b": (np.zeros((4, 1)), [1, 1, 1, 1])}
    return survey(from_shards(shards).split(0))


def test_a_summary_by_hand() -> None:
    half = np.log2  # of two clients that know one class each
    first = (half(2 / (1 + 1 / 3)) + (1 / 3) * half((1 / 3) / (2 / 3)) + (2 / 3) * half(2)) / 2
    second = (half(2 / (1 + 2 / 3)) + (2 / 3) * half((2 / 3) / (5 / 6)) + (1 / 3) * half(2)) / 2

    assert by_hand().summary() == {
        "clients": 2,
        "examples": 6,
        "size_min": 2,
        "size_median": 3,
        "size_max": 4,
        "classes_min": 1,
        "classes_median": 1,
        "classes_max": 1,
        "effective_clients": 36 / 20,
        "total_variation": pytest.approx((2 / 3 + 1 / 3) / 2),
        "divergence": pytest.approx((first + second) / 2),
        "divergence_p5": pytest.approx(second + 0.05 * (first - second)),
        "divergence_p95": pytest.approx(second + 0.95 * (first - second)),
    }


def test_a_divergence_is_the_entropy_of_the_middle_less_the_mean_entropy() -> None:
    """JS(p, q) = H((p + q)/2) − (H(p) + H(q))/2, another form of the definition."""
    found = survey(from_arrays(X, LABELS, partition=Dirichlet(6, 0.2)).split(0))
    assert found.counts is not None and found.divergences is not None

    def entropy(p: np.ndarray) -> float:
        return float(-sum(x * np.log2(x) for x in p if x > 0))

    overall = found.counts.sum(0) / found.counts.sum()
    for line, divergence in zip(found.counts, found.divergences, strict=True):
        p = line / line.sum()
        expected = entropy((p + overall) / 2) - (entropy(p) + entropy(overall)) / 2
        assert divergence == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_the_scale() -> None:
    everyone = {str(n): (np.zeros((4, 1)), [0, 0, 1, 1]) for n in range(3)}
    alone = {str(n): (np.zeros((1, 1)), [n]) for n in range(200)}

    assert survey(from_shards(everyone).split(0)).divergences == pytest.approx([0, 0, 0])
    assert 0.95 < survey(from_shards(alone).split(0)).summary()["divergence"] < 1


def test_mixes_are_left_out_where_there_are_no_classes() -> None:
    found = survey(from_arrays(X, np.linspace(0, 1, 600), partition=Iid(6)).split(0))

    assert found.summary()["effective_clients"] == 6
    assert found.counts is None and found.divergences is None
    assert "divergence" not in found.summary()


def test_splits_are_ranked_by_their_skew() -> None:
    made = [from_arrays(X, LABELS, partition=Dirichlet(5, alpha)).split(0) for alpha in (0.1, 1.0, 100.0)]
    for key in ("total_variation", "divergence"):
        distances = [survey(data).summary()[key] for data in made]
        assert distances == sorted(distances, reverse=True)


def test_held_out_rows_and_the_test_set_are_counted_apart() -> None:
    test = (X[:3], [0, 0, 9])
    found = survey(from_arrays(X, LABELS, partition=Iid(6), client_test=0.2, test=test).split(0))

    assert found.sizes.tolist() == [80] * 6 and found.held_out.tolist() == [20] * 6
    assert found.counts is not None and found.counts.sum() == 480
    assert found.test == 3 and found.test_counts is not None
    assert found.test_counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_a_sequence_counts_each_of_its_labels() -> None:
    shards = {"a": (np.zeros((1, 3)), [[0, 1, 1]]), "b": (np.zeros((1, 3)), [[2, 2, 2]])}

    counts = survey(from_shards(shards).split(0)).counts
    assert counts is not None and counts.tolist() == [[1, 2, 0], [0, 0, 3]]


def test_of_a_large_population_some_are_looked_at() -> None:
    made = list[str]()

    def shard(client: str) -> Shard:
        made.append(client)
        label = torch.full((2,), int(client) % 3)
        return Shard(torch.zeros(2, 1), label, torch.zeros(1, 1), label[:1])

    found = survey(LazyData(Numbered(1_000_000), shard, classes=3, shape=(1,)), most=40)

    assert made == [str(25_000 * n) for n in range(40)]
    assert found.population == 1_000_000 and found.sizes.tolist() == [2] * 40
    assert found.counts is not None and found.counts.sum(1).tolist() == [2] * 40
    assert found.held_out.tolist() == [1] * 40


def test_lazy_and_ready_shards_are_described_alike() -> None:
    ready = from_arrays(X, LABELS, partition=Dirichlet(6, 0.2), client_test=0.1).split(0)
    assert isinstance(ready, ArrayData)
    lazy = LazyData(ready.clients, ready.shard, classes=10)

    assert survey(lazy).summary() == survey(ready).summary()
    assert survey(ready, most=4).clients == ready.clients[::2]


def test_public_names_are_sorted() -> None:
    assert module.__all__ == sorted(module.__all__)
