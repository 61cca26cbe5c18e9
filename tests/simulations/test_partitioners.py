"""Partitioners: what each promises for any labels, and their distributions against the definitions."""

import itertools
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, is_dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protos import registry
from shoal.protos.errors import DataError
from shoal.simulations import dealing, interleaving, label_skew, partitioners, quantity_skew
from shoal.simulations.dealing import take
from shoal.simulations.label_skew import (
    Continuous,
    Dirichlet,
    DirichletMix,
    Distribution,
    InnerDirichlet,
    Pathological,
    PowerLaw,
    Shards,
    Similarity,
)
from shoal.simulations.partitioners import GroupedNatural, Iid, Natural, Partitioner, Resampled
from shoal.simulations.quantity_skew import Growing, QuantitySkew, Sizes

LABELS = np.repeat(np.arange(10), 60)  # 600 rows
CLIENTS = np.array(["b", "a", "c", "a"])[np.arange(600) % 4]
ALL: list[Partitioner] = [
    Iid(7),
    Dirichlet(7, 0.5),
    Dirichlet(7, 100.0, min_examples=20),
    DirichletMix(7, 0.5),
    InnerDirichlet(7, 0.5),
    InnerDirichlet(7, 0.1, sigma=1.0),
    Pathological(10),
    Pathological(7, 3, "random"),
    Pathological(10, 4, "cyclic"),
    Shards(7),
    Shards(7, 5),
    Similarity(7, 0.0),
    Similarity(7, 0.3),
    Distribution([[0.5, 0.25] * 5, [0.5, 0.75] * 5]),
    PowerLaw(20),
    Continuous(7, 0.9),
    QuantitySkew(7, 1.0),
    Growing(7),
    Growing(7, "square"),
    Growing(4, "exponential"),
    Sizes([1, 2, 300, 297]),
    Natural(),
    GroupedNatural(2),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def split(partitioner: Partitioner, labels: np.ndarray = LABELS, seed: int = 0) -> Mapping[str, np.ndarray]:
    return partitioner.split(labels, CLIENTS[: len(labels)], rng(seed))


def mixes(shards: Mapping[str, np.ndarray], labels: np.ndarray = LABELS) -> np.ndarray:
    counts = np.array([np.bincount(labels[rows], minlength=10) for rows in shards.values()])
    return np.asarray(counts / counts.sum(1, keepdims=True))


def sizes(shards: Mapping[str, np.ndarray]) -> list[int]:
    return [len(rows) for rows in shards.values()]


def check(shards: Mapping[str, np.ndarray], rows: int, most_left_over: int = 0) -> None:
    """Every row goes to one client, every client has rows, in order."""
    dealt = np.concatenate(list(shards.values()))
    assert len(np.unique(dealt)) == len(dealt)
    assert dealt.min() >= 0 and dealt.max() < rows
    assert rows - most_left_over <= len(dealt) <= rows
    assert all(len(rows) > 0 and (np.diff(rows) > 0).all() for rows in shards.values())


@pytest.mark.parametrize("partitioner", ALL, ids=str)
def test_every_row_goes_to_one_client(partitioner: Partitioner) -> None:
    shards = split(partitioner)

    left_over = {DirichletMix: 6, Pathological: 600}.get(type(partitioner), 0)
    check(shards, 600, 0 if partitioner in (Pathological(10), Pathological(10, 4, "cyclic")) else left_over)
    if not isinstance(partitioner, Natural):
        assert list(shards) == [str(number) for number in range(len(shards))]


@pytest.mark.parametrize("partitioner", ALL, ids=str)
def test_a_split_depends_on_its_generator_only(partitioner: Partitioner) -> None:
    first, again, other = split(partitioner), split(partitioner), split(partitioner, seed=1)

    assert first.keys() == again.keys()
    assert all(np.array_equal(first[client], again[client]) for client in first)
    if not isinstance(partitioner, Natural | GroupedNatural):
        assert any(not np.array_equal(first[client], other[client]) for client in first)


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, int, np.random.Generator]:
    """Labels, a number of clients that they are enough for, and a generator."""
    labels = np.array(draw(st.lists(st.integers(-3, 9), min_size=1, max_size=120)))
    return labels, draw(st.integers(1, len(labels))), rng(draw(st.integers(0, 2**32 - 1)))


@pytest.mark.slow
@given(tables(), st.floats(0.01, 50), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_labels_are_dealt_out_once(
    table: tuple[np.ndarray, int, np.random.Generator], alpha: float, least: int
) -> None:
    labels, clients, generator = table
    exact = len(labels) // clients

    for partitioner in (Iid(clients), InnerDirichlet(clients, alpha), Similarity(clients, min(alpha / 50, 1.0))):
        shards = partitioner.split(labels, None, generator)
        check(shards, len(labels))
        slack = 1 if isinstance(partitioner, Similarity) else 0
        assert set(sizes(shards)) <= set(range(exact - slack, exact + 2 + slack))
    mixed = DirichletMix(clients, alpha).split(labels, None, generator)
    check(mixed, len(labels), clients - 1)
    assert set(sizes(mixed)) == {exact}
    for skewed in (Dirichlet(clients, alpha, least), QuantitySkew(clients, alpha, least)):
        try:
            shards = skewed.split(labels, None, generator)
        except DataError as error:
            assert "min_examples" in str(error) or "needs at least" in str(error)
        else:
            check(shards, len(labels))
            assert len(shards) == clients and min(sizes(shards)) >= least


@pytest.mark.slow
@given(tables(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_few_classes_a_client_for_any_labels(table: tuple[np.ndarray, int, np.random.Generator], k: int) -> None:
    labels, clients, generator = table
    present = len(np.unique(labels))
    for assignment in ("first", "random", "cyclic"):
        try:
            shards = Pathological(clients, k, assignment).split(labels, None, generator)
        except DataError as error:
            assert "lower data.partition" in str(error)
            continue
        check(shards, len(labels), len(labels))
        assert {len(np.unique(labels[rows])) for rows in shards.values()} == {k}
        if assignment != "random" and clients >= present:
            check(shards, len(labels))
        for label in np.unique(labels):  # shared equally by those who know it
            counts = [n for rows in shards.values() if (n := int((labels[rows] == label).sum()))]
            assert not counts or max(counts) - min(counts) <= 1
    pieces = Shards(max(1, clients // k), min(k, clients)).split(labels, None, generator)
    check(pieces, len(labels))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 50), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sizes_are_those_that_were_asked_for(wanted: list[int], over: int, seed: int) -> None:
    labels = np.zeros(sum(wanted) + over, np.int64)

    assert sizes(Sizes(wanted).split(labels, None, rng(seed))) == wanted
    with pytest.raises(DataError, match="lower its sizes"):
        Sizes([*wanted, over + 1]).split(labels, None, rng(seed))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_groups_hold_whole_clients(ids: list[str], group_size: int) -> None:
    clients, found = np.array(ids), len(set(ids))

    for rest in ("smaller", "bigger", "drop", "refuse"):
        try:
            groups = GroupedNatural(group_size, rest).split(clients, clients, rng())
        except DataError:
            assert rest != "smaller" and (found < group_size or (rest == "refuse" and found % group_size))
            continue
        check(groups, len(ids), len(ids) if rest == "drop" else 0)
        inside = [set(clients[rows].tolist()) for rows in groups.values()]
        assert sum(map(len, inside)) == len(set().union(*inside))
        assert sum(map(len, inside)) == (found - found % group_size if rest == "drop" else found)
        assert all(len(group) == group_size for group in inside[: None if rest in ("drop", "refuse") else 0])
        assert len(inside) == -(-found // group_size) if rest == "smaller" else found // group_size


@pytest.mark.parametrize("partitioner", ALL, ids=str)
def test_partitioners_are_frozen_dataclasses(partitioner: Partitioner) -> None:
    assert is_dataclass(partitioner)
    with pytest.raises(FrozenInstanceError):
        partitioner.alpha = 1.0


def test_every_kind_is_tested() -> None:
    kinds = {registry.load("shoal.partitioners", name) for name in registry.names("shoal.partitioners")}

    assert kinds == {type(partitioner) for partitioner in ALL} | {Resampled}


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

    ours = np.mean([take(left, mix, size, generator) for _ in range(800)], axis=0)
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


def test_inner_dirichlet_has_the_moments_of_the_distribution() -> None:
    labels = np.repeat([0, 1, 2], 20_000)  # about as many of each as are wanted
    shards = [InnerDirichlet(200, 0.8).split(labels, None, rng(seed)) for seed in range(3)]
    drawn = [float((labels[rows] == 0).mean()) for split in shards for rows in split.values()]

    # Beta(α, 2α) has variance 2/(9(3α+1)); the rows drawn from it add E[q(1-q)]/n.
    between = 2 / (9 * (3 * 0.8 + 1))
    assert np.mean(drawn) == pytest.approx(1 / 3)  # every row is dealt out
    np.testing.assert_allclose(np.var(drawn), between + (2 / 9 - between) / 300, rtol=0.15)


@pytest.mark.slow
def test_interleaving_is_drawing_one_by_one() -> None:
    """Against the loop of the definition: whose turn, which class, one row at a time."""
    per_class, wanted = np.array([3, 4, 30]), np.array([8, 5, 9])
    mixes = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    generator = rng()

    def one_by_one() -> np.ndarray:
        left, quota, counts = per_class.copy(), wanted.copy(), np.zeros((3, 3), np.int64)
        while quota.any():
            client = generator.choice(np.flatnonzero(quota))
            weights = np.where(left > 0, mixes[client], 0)
            drawn = generator.choice(3, p=weights / weights.sum())
            quota[client] -= 1
            left[drawn] -= 1
            counts[client, drawn] += 1
        return counts

    made = [interleaving.interleave(per_class, wanted, mixes, generator) for _ in range(250)]
    assert all((counts.sum(1) == wanted).all() and (counts.sum(0) <= per_class).all() for counts in made)
    np.testing.assert_allclose(np.mean(made, axis=0), np.mean([one_by_one() for _ in range(250)], axis=0), atol=0.4)


def test_lognormal_sizes() -> None:
    shards = InnerDirichlet(400, 1.0, sigma=0.7).split(np.repeat(np.arange(4), 20_000), None, rng())

    logs = np.log(sizes(shards))
    assert logs.std() == pytest.approx(0.7, abs=3.3 * 0.7 / np.sqrt(800))  # the error of a deviation: σ/√(2n)


def test_growing_sizes_follow_their_rule() -> None:
    number = np.arange(1, 9)
    for partitioner, grown in (
        (Growing(8, "linear"), number),
        (Growing(8, "square"), number**2),
        (Growing(8, "exponential"), np.exp(number)),
    ):
        found = sizes(partitioner.split(np.zeros(60_000, np.int64), None, rng()))
        np.testing.assert_allclose(found, grown / grown.sum() * 60_000, atol=1)
    with pytest.raises(DataError, match=r"leaves client '0' without a row of 600; lower data.partition.clients"):
        split(Growing(900, "exponential"))


def test_a_distribution_is_followed_to_the_row() -> None:
    labels = np.repeat([5, 7], [100, 60])
    shards = Distribution([[0.25, 0.0], [0.5, 0.5], [0.25, 0.25]]).split(labels, None, rng())

    counts = [[int((labels[rows] == c).sum()) for c in (5, 7)] for rows in shards.values()]
    assert counts == [[25, 0], [50, 30], [25, 15]]
    with pytest.raises(DataError, match=r"lines of \[2, 3\] numbers for 2 classes"):
        Distribution([[0.5, 0.5], [0.1, 0.2, 0.3]]).split(labels, None, rng())
    with pytest.raises(DataError, match=r"gives 1.2 of class 1; it may give 1 at most"):
        Distribution([[0.5, 0.6], [0.5, 0.6]]).split(labels, None, rng())
    with pytest.raises(DataError, match=r"leaves client '1' without a row of 160"):
        Distribution([[0.5, 0.6], [0.0, 0.0]]).split(labels, None, rng())


def test_power_law_sizes() -> None:
    """Two classes each and at least five rows of both; the others log-normal, so that a few clients have most."""
    labels = np.repeat(np.arange(10), 6_000)
    shards = PowerLaw(1000).split(labels, None, rng())
    check(shards, 60_000)
    counts = np.array([np.bincount(labels[rows], minlength=10) for rows in shards.values()])

    assert ((counts > 0).sum(1) == 2).all() and (counts[counts > 0] >= 5).all()
    assert (counts[13, [3, 4]] > 0).all()
    share = np.sort(counts[:, 0][counts[:, 0] > 0] - 5)[::-1]
    expected = np.sort(rng(1).lognormal(0, 2, (400, 200)), axis=1)[:, ::-1]
    expected /= expected.sum(1, keepdims=True)
    low, high = np.quantile(expected[:, :20].sum(1), [0.001, 0.999])
    assert low < share[:20].sum() / share.sum() < high
    with pytest.raises(DataError, match=r"does not fit 60 to 60 rows of 10 classes: .*with 5 rows for each; change"):
        split(PowerLaw(200))


def test_similarity_is_a_part_at_random_and_the_rest_by_label() -> None:
    known = [np.mean((mixes(split(Similarity(10, s))) > 0).sum(1)) for s in (0.0, 0.1, 1.0)]

    assert known[0] == 1 and known[1] > 3 and known[2] == 10
    mix = mixes(split(Similarity(10, 0.5)))
    assert 0.45 < mix.max(1).mean() < 0.6  # half, and a tenth of the other half, less where pieces cross a class


def test_continuous_shards_follow_the_number() -> None:
    """corr(b, z) = s/√(s² + (1-s)²) for labels that are normal."""
    labels = rng(3).standard_normal(20_000).astype(np.float32)
    for strictness in (0.0, 0.5, 0.8):
        shards = Continuous(200, strictness).split(labels, None, rng())
        rank = np.empty(len(labels))
        for number, rows in enumerate(shards.values()):
            rank[rows] = number
        blurred = np.corrcoef(rank, labels)[0, 1] / np.sqrt(3 / np.pi)  # a rank instead of a normal value
        assert blurred == pytest.approx(strictness / np.hypot(strictness, 1 - strictness), abs=0.03)
    exact = Continuous(4, 1.0).split(labels, None, rng())
    assert [labels[rows].max() for rows in exact.values()][:3] <= [labels[rows].min() for rows in exact.values()][1:]
    with pytest.raises(DataError, match=r"sorts by label, but the labels are .*or all one"):
        Continuous(2).split(np.ones(10), None, rng())


def test_resampled_clients_draw_for_themselves() -> None:
    shards = split(Resampled(1_000_000, 20, alpha=1.0))

    assert len(shards) == 1_000_000 and "999999" in shards and "1000000" not in shards
    for client in ("0", "7", "999999"):
        rows = shards[client]
        assert len(rows) == 20 and (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < 600
        assert np.array_equal(rows, split(Resampled(1_000_000, 20, alpha=1.0))[client])
    assert not np.array_equal(shards["0"], shards["1"])
    assert not np.array_equal(shards["0"], split(Resampled(1_000_000, 20, alpha=1.0), seed=1)["0"])
    with pytest.raises(DataError, match="needs at least 1 × 601 rows"):
        split(Resampled(5, 601))
    with pytest.raises(KeyError):
        shards["-1"]


def test_resampled_mixes_have_the_moments_of_the_distribution() -> None:
    labels = np.repeat([0, 1], [30_000, 10_000])
    uniform, skewed = Resampled(400, 50).split(labels, None, rng()), Resampled(400, 50, 3.0).split(labels, None, rng())

    plain = [labels[rows].mean() for rows in uniform.values()]
    drawn = [labels[rows].mean() for rows in skewed.values()]
    p, between = 0.25, 0.25 * 0.75 / (3 + 1)
    np.testing.assert_allclose([np.mean(plain), np.mean(drawn)], p, atol=0.04)
    np.testing.assert_allclose(np.var(plain), p * (1 - p) / 50, rtol=0.25)
    np.testing.assert_allclose(np.var(drawn), between + (p * (1 - p) - between) / 50, rtol=0.25)


@pytest.mark.parametrize("module", [dealing, interleaving, label_skew, partitioners, quantity_skew])
def test_public_names_are_sorted(module: object) -> None:
    assert vars(module)["__all__"] == sorted(vars(module)["__all__"])
