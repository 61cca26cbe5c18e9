import itertools
from dataclasses import FrozenInstanceError, is_dataclass

import numpy as np
import pytest

from shoal.protos.errors import DataError
from shoal.simulations import partitioners
from shoal.simulations.partitioners import (
    Dirichlet,
    DirichletMix,
    Iid,
    Natural,
    Partitioner,
    QuantitySkew,
    Shards,
    describe,
)

LABELS = np.repeat(np.arange(10), 60)  # 600 rows
CLIENTS = np.array(["b", "a", "c", "a"])[np.arange(600) % 4]
ALL: list[Partitioner] = [
    Iid(7),
    Dirichlet(7, 0.5),
    Dirichlet(7, 100.0, min_examples=20),
    DirichletMix(7, 0.5),
    Shards(7),
    Shards(7, 5),
    QuantitySkew(7, 1.0),
    Natural(),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def split(partitioner: Partitioner, labels: np.ndarray = LABELS, seed: int = 0) -> dict[str, np.ndarray]:
    return partitioner.split(labels, CLIENTS[: len(labels)], rng(seed))


def mixes(shards: dict[str, np.ndarray], labels: np.ndarray = LABELS) -> np.ndarray:
    counts = np.array([np.bincount(labels[rows], minlength=10) for rows in shards.values()])
    return np.asarray(counts / counts.sum(1, keepdims=True))


@pytest.mark.parametrize("partitioner", ALL, ids=str)
def test_every_row_goes_to_one_client_at_most(partitioner: Partitioner) -> None:
    shards = split(partitioner)

    rows = np.concatenate(list(shards.values()))
    left_over = len(LABELS) % 7 if isinstance(partitioner, DirichletMix) else 0
    assert len(rows) == len(LABELS) - left_over
    assert len(np.unique(rows)) == len(rows)
    assert all(len(rows) > 0 and (np.diff(rows) > 0).all() for rows in shards.values())
    if not isinstance(partitioner, Natural):
        assert list(shards) == [str(number) for number in range(7)]


@pytest.mark.parametrize("partitioner", ALL, ids=str)
def test_a_split_depends_on_its_generator_only(partitioner: Partitioner) -> None:
    first, again, other = split(partitioner), split(partitioner), split(partitioner, seed=1)

    assert all(np.array_equal(first[client], again[client]) for client in first)
    if not isinstance(partitioner, Natural):
        assert any(not np.array_equal(first[client], other[client]) for client in first)


@pytest.mark.parametrize("partitioner", ALL, ids=str)
def test_partitioners_are_frozen_dataclasses(partitioner: Partitioner) -> None:
    assert is_dataclass(partitioner)
    with pytest.raises(FrozenInstanceError):
        partitioner.alpha = 1.0


def test_iid_gives_equal_sizes_and_the_global_mix() -> None:
    shards = split(Iid(7))

    assert {len(rows) for rows in shards.values()} == {85, 86}
    # The mix of n rows is off by √(p(1-p)/n) = 0.032; five times that.
    assert np.abs(mixes(shards) - 0.1).max() < 0.16


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    clients, alpha, rows = 4, 0.7, 2_000
    labels = np.zeros(rows, np.int64)
    generator = rng()

    draws = [Dirichlet(clients, alpha, 1).split(labels, None, generator) for _ in range(400)]
    shares = np.array([[len(shard) / rows for shard in draw.values()] for draw in draws])

    # Dir(α,…,α) over N: mean 1/N, variance (N-1)/(N²(Nα+1)), covariance -1/(N²(Nα+1)); few draws are made again.
    scale = clients**2 * (clients * alpha + 1)
    np.testing.assert_allclose(shares.mean(0), 1 / clients, atol=0.05)
    np.testing.assert_allclose(shares.var(0).mean(), (clients - 1) / scale, rtol=0.1)
    pairs = [np.cov(shares[:, i], shares[:, j])[0, 1] for i, j in itertools.combinations(range(clients), 2)]
    np.testing.assert_allclose(np.mean(pairs), -1 / scale, rtol=0.1)


def test_dirichlet_is_iid_for_large_alpha_and_one_client_a_class_for_small() -> None:
    smooth, rough = split(Dirichlet(5, 1e6)), split(Dirichlet(3, 0.01))

    assert {len(rows) for rows in smooth.values()} <= set(range(115, 126))
    assert np.abs(mixes(smooth) - 0.1).max() < 0.01
    by_class = [np.equal(LABELS, label) for label in range(10)]
    owners = [max(mine[rows].sum() / mine.sum() for rows in rough.values()) for mine in by_class]
    assert np.mean(owners) > 0.95


def test_dirichlet_mix_gives_equal_sizes_whatever_alpha() -> None:
    for alpha in (0.01, 1.0, 1e6):
        assert {len(rows) for rows in split(DirichletMix(7, alpha)).values()} == {600 // 7}


def test_dirichlet_mix_has_the_moments_of_the_distribution() -> None:
    size, alpha = 200, 3.0
    labels = np.repeat([0, 1], [30_000, 10_000])  # far more than is drawn, so that nothing is used up

    generator = rng()
    drawn = []
    for _ in range(3):
        shards = DirichletMix(200, alpha).split(labels, None, generator)
        drawn += [(labels[rows] == 1).mean() for rows in list(shards.values())[:40]]

    # q ~ Beta(αp, α(1-p)): variance p(1-p)/(α+1); the rows drawn from it add E[q(1-q)]/n.
    p, n = 0.25, size
    between = p * (1 - p) / (alpha + 1)
    np.testing.assert_allclose(np.mean(drawn), p, atol=0.06)
    np.testing.assert_allclose(np.var(drawn), between + (p * (1 - p) - between) / n, rtol=0.25)


def test_dirichlet_mix_limits() -> None:
    # 600 rows for 3 × 200: even the last client follows a large α, while a small one is bound to a few classes.
    assert np.abs(mixes(split(DirichletMix(3, 1e9))) - 0.1).max() < 0.1
    first = next(iter(split(DirichletMix(30, 0.01)).values()))
    assert len(np.unique(LABELS[first])) == 1


def test_dirichlet_mix_uses_up_every_row_when_sizes_divide() -> None:
    shards = split(DirichletMix(6, 0.05))

    assert sum(len(rows) for rows in shards.values()) == 600


def test_a_used_up_class_is_replaced_as_if_rows_were_drawn_one_by_one() -> None:
    left, mix, size = np.array([2, 3, 40]), np.array([0.5, 0.4, 0.1]), 8
    generator = rng()

    def one_by_one() -> np.ndarray:
        taken = np.zeros(3, np.int64)
        for _ in range(size):
            weights = np.where(taken < left, mix, 0)
            taken[generator.choice(3, p=weights / weights.sum())] += 1
        return taken

    ours = np.mean([partitioners._take(left, mix, size, generator) for _ in range(800)], axis=0)
    np.testing.assert_allclose(ours, np.mean([one_by_one() for _ in range(800)], axis=0), atol=0.1)


def test_shards_bring_few_classes() -> None:
    exact, crossing = split(Shards(10, 2)), split(Shards(7, 2))

    assert max((mixes(exact) > 0).sum(1)) <= 2  # 20 pieces of 30 rows: none crosses a class of 60
    assert max((mixes(crossing) > 0).sum(1)) <= 2 * 2
    assert {len(rows) for rows in exact.values()} == {60}


def test_quantity_skew_changes_sizes_but_not_the_mix() -> None:
    skewed, even = split(QuantitySkew(5, 0.8, min_examples=10)), split(QuantitySkew(5, 1e6))

    sizes = [len(rows) for rows in skewed.values()]
    assert min(sizes) >= 10
    assert max(sizes) > 2 * min(sizes)
    assert {len(rows) for rows in even.values()} <= {119, 120, 121}
    largest = max(skewed.values(), key=len)
    assert np.abs(mixes({"": largest}) - 0.1).max() < 0.1


def test_natural_takes_the_datas_own_clients() -> None:
    clients = np.array(["b", "a", "b", "c", "b", "a"])

    assert {c: rows.tolist() for c, rows in Natural().split(clients, clients, rng()).items()} == {
        "a": [1, 5],
        "b": [0, 2, 4],
        "c": [3],
    }
    assert list(Natural(min_examples=2).split(clients, clients, rng())) == ["a", "b"]


@pytest.mark.parametrize(
    "partitioner", [Iid(700), Dirichlet(700, 1.0), DirichletMix(700, 1.0), QuantitySkew(700, 1.0)], ids=str
)
def test_more_clients_than_rows(partitioner: Partitioner) -> None:
    with pytest.raises(
        DataError, match=r"clients=700.* needs at least 700 × 1 rows, but there are 600; lower data.part"
    ):
        split(partitioner)


def test_more_shards_than_rows() -> None:
    with pytest.raises(DataError, match=r"Shards\(clients=400, .* needs at least 400 × 2 rows, but there are 600"):
        split(Shards(400, 2))


@pytest.mark.parametrize("labels", [np.linspace(0, 1, 50), np.zeros((50, 2), np.int64)])
@pytest.mark.parametrize("partitioner", [Dirichlet(5, 1.0), DirichletMix(5, 1.0), Shards(5)], ids=str)
def test_splits_by_class_need_classes(partitioner: Partitioner, labels: np.ndarray) -> None:
    with pytest.raises(
        DataError, match=r"splits by class, but the labels are .*; split by 'iid', .*or give integer labels"
    ):
        split(partitioner, labels)


def test_a_minimum_out_of_reach() -> None:
    with pytest.raises(
        DataError, match=r"Dirichlet\(.*none of 1000 draws over 600 rows .*min_examples=50; raise .*alpha"
    ):
        split(Dirichlet(12, 0.01, min_examples=50))
    with pytest.raises(DataError, match=r"lower .*min_examples"):
        split(QuantitySkew(10, 0.01, min_examples=50))
    with pytest.raises(DataError, match=r"Natural.*: the largest of 3 clients has 300 rows; lower .*min_examples"):
        split(Natural(min_examples=301))


def test_data_without_clients() -> None:
    with pytest.raises(DataError, match=r"does not name its clients: give the column .*or a partition such as"):
        Natural().split(LABELS, None, rng())


def test_describe_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 1, 1])
    shards = {"a": np.array([0, 1]), "b": np.array([2, 3, 4, 5])}

    assert describe(shards, labels) == {
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
    }


def test_describe_leaves_the_mix_out_where_there_are_no_classes() -> None:
    described = describe(split(Iid(6)), np.linspace(0, 1, 600))

    assert described["effective_clients"] == 6
    assert "total_variation" not in described


def test_describe_ranks_splits_by_their_skew() -> None:
    distances = [describe(split(Dirichlet(5, alpha)), LABELS)["total_variation"] for alpha in (0.1, 1.0, 100.0)]

    assert distances == sorted(distances, reverse=True)


def test_public_names_are_sorted() -> None:
    assert partitioners.__all__ == sorted(partitioners.__all__)
