"""Hugging Face's and flwr's own objects, made here from arrays; and their partitioners beside ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.protos.errors import DataError
from shoal.simulations import label_skew, quantity_skew
from shoal.simulations.datasets import from_flwr, from_huggingface
from shoal.simulations.partitioners import GroupedNatural, Iid, Partitioner

LABELS = np.repeat(np.arange(5), 60)
Theirs = Callable[..., Any]  # of their module, and a seed where they take one
SITES = np.array([f"site {n % 7}" for n in range(300)])


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """Imported here, and not by everybody who collects this file: it takes seconds."""
    quiet = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quiet.items():
            patch.setenv(name, value)
        import datasets

        yield datasets


@pytest.fixture(scope="module")
def theirs(hub: Any) -> Any:
    from flwr_datasets import partitioner

    return partitioner


@pytest.fixture(scope="module")
def rows(hub: Any) -> Any:
    kinds = hub.ClassLabel(names=["ant", "bee", "cat", "dog", "eel"])
    features = {"kind": kinds, "site": hub.Value("string"), "u": hub.Value("float32"), "v": hub.Value("int64")}
    columns = {"kind": LABELS.tolist(), "site": SITES.tolist(), "u": np.arange(300.0).tolist(), "v": [7] * 300}
    images = [np.full((4, 4), n % 256, np.uint8) for n in range(300)]
    features["image"] = hub.Image()
    return hub.Dataset.from_dict({**columns, "image": images}, features=hub.Features(features))


def test_a_table_becomes_a_data_set(rows: Any) -> None:
    data = from_huggingface(rows, x=["u", "v"], y="kind", client="site", test=rows.select(range(9)), client_test=0.2)
    split = data.split(0)

    assert data.train.class_names == ("ant", "bee", "cat", "dog", "eel") and data.classes == 5
    assert data.train.x[:2].tolist() == [[0, 7], [1, 7]] and data.train.y.tolist() == LABELS.tolist()
    assert list(split.clients) == [f"site {n}" for n in range(7)]
    assert split.test is not None and len(split.test) == 9
    assert split.shard("site 3").held_out is not None


def test_images_become_pixels(rows: Any) -> None:
    data = from_huggingface(rows, x="image", y="kind", partition=Iid(3))

    assert data.train.x.shape == (300, 1, 4, 4)
    assert data.train.x[51, 0, 0, 0] == np.float32(51 / 255)


def test_text_labels_are_numbered_alike_in_all_partitions(rows: Any, theirs: Any) -> None:
    partitioner = theirs.NaturalIdPartitioner(partition_by="site")
    partitioner.dataset = rows
    data = from_flwr(partitioner, x=["u"], y="site", test=rows.select([6, 0]))

    assert data.train.class_names == tuple(f"site {n}" for n in range(7))
    assert data.test is not None and data.test.y.tolist() == [6, 0]


def test_what_is_no_table_is_refused(rows: Any, hub: Any, theirs: Any) -> None:
    with pytest.raises(DataError, match=r"a list is no datasets.Dataset; choose a split"):
        from_huggingface([1], x="u", y="kind")
    with pytest.raises(DataError, match=r"a DatasetDict is no datasets.Dataset; choose a split"):
        from_huggingface(hub.DatasetDict(train=rows), x="u", y="kind")
    with pytest.raises(DataError, match=r"no column 'knd' \(did you mean 'kind'\?\)"):
        from_huggingface(rows, x="u", y="knd")
    kinds = hub.Features({"u": hub.Value("float32"), "kind": rows.features["kind"]})
    unknown = hub.Dataset.from_dict({"u": [1.0, 2.0], "kind": [0, -1]}, features=kinds)
    with pytest.raises(DataError, match="row 1 has no label in column 'kind'; drop such rows"):
        from_huggingface(unknown, x=["u"], y="kind")
    with pytest.raises(DataError, match="the IidPartitioner has no data; set its dataset first"):
        from_flwr(theirs.IidPartitioner(3), x=["u"], y="kind")
    with pytest.raises(DataError, match="a list is no FederatedDataset and no partitioner"):
        from_flwr([1], x=["u"], y="kind")


def test_partitions_are_clients(rows: Any, theirs: Any) -> None:
    named, numbered = theirs.NaturalIdPartitioner(partition_by="site"), theirs.IidPartitioner(4)
    for partitioner, clients in ((named, [f"site {n}" for n in range(7)]), (numbered, ["0", "1", "2", "3"])):
        partitioner.dataset = rows
        data = from_flwr(partitioner, x=["u", "v"], y="kind")
        split = data.split(0)
        assert list(split.clients) == clients and data.train.class_names is not None
        for number, client in enumerate(clients):
            assert split.shard(client).x[:, 0].tolist() == partitioner.load_partition(number)["u"][:]


@pytest.mark.slow
def test_a_federated_data_set_is_read_whole(rows: Any, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    rows.select(range(30)).to_parquet(tmp_path / "files" / "test.parquet")
    import flwr_datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # files that the library leaves to the garbage collector
        source = flwr_datasets.FederatedDataset(
            dataset=str(tmp_path / "files"), partitioners={"train": 3}, cache_dir=str(tmp_path / "cache")
        )
        data = from_flwr(source, x="image", y="kind", test="test")

    assert [len(data.split(0).shard(str(n))) for n in range(3)] == [100] * 3
    assert data.test is not None and len(data.test) == 30 and data.test.class_names == data.train.class_names
    with pytest.raises(DataError, match=r"no partitioner for split 'trian' \(did you mean 'train'\?\)"):
        from_flwr(source, x="image", y="kind", split="trian")


def of_theirs(hub: Any, partitioner: Any, labels: np.ndarray = LABELS) -> np.ndarray:
    """How many rows of each class its partitions have ``[N, C]``."""
    table = {"kind": labels.tolist(), "site": SITES[np.arange(len(labels)) % 300].tolist()}
    partitioner.dataset = hub.Dataset.from_dict(table)
    parts = [np.asarray(partitioner.load_partition(i)["kind"][:]) for i in range(partitioner.num_partitions)]
    return np.array([np.bincount(part, minlength=labels.max() + 1) for part in parts])


def of_ours(partitioner: Partitioner, labels: np.ndarray = LABELS, seed: int = 0) -> np.ndarray:
    shards: Mapping[str, np.ndarray] = partitioner.split(labels, SITES, np.random.default_rng(seed))
    return np.array([np.bincount(labels[rows], minlength=labels.max() + 1) for rows in shards.values()])


@pytest.mark.parametrize(
    ("our", "their"),
    [
        (quantity_skew.Growing(6, "linear"), lambda theirs: theirs.LinearPartitioner(6)),
        (quantity_skew.Growing(6, "square"), lambda theirs: theirs.SquarePartitioner(6)),
        (quantity_skew.Growing(5, "exponential"), lambda theirs: theirs.ExponentialPartitioner(5)),
        (quantity_skew.Sizes([10, 90, 200]), lambda theirs: theirs.SizePartitioner([10, 90, 200])),
        (
            label_skew.Pathological(10, 2, "cyclic"),
            lambda theirs: theirs.PathologicalPartitioner(10, "kind", 2, "deterministic"),
        ),
        (GroupedNatural(2), lambda theirs: theirs.GroupedNaturalIdPartitioner("site", 2, sort_unique_ids=True)),
        (
            GroupedNatural(2, "bigger"),
            lambda theirs: theirs.GroupedNaturalIdPartitioner("site", 2, "allow-bigger", True),
        ),
        (
            GroupedNatural(2, "drop"),
            lambda theirs: theirs.GroupedNaturalIdPartitioner("site", 2, "drop-reminder", True),
        ),
        (label_skew.Continuous(6, 1.0), lambda theirs: theirs.ContinuousPartitioner(6, "kind", 1.0)),
    ],
    ids=lambda value: str(value) if isinstance(value, Partitioner) else "",
)
def test_what_is_not_random_is_as_theirs(our: Partitioner, their: Theirs, hub: Any, theirs: Any) -> None:
    """Sizes but for rounding, which they leave to the last client; by label also the mixes."""
    ours, others = of_ours(our), of_theirs(hub, their(theirs))

    assert ours.shape == others.shape
    slack = len(ours) if isinstance(our, quantity_skew.Growing) else 0
    assert np.abs(ours.sum(1) - others.sum(1)).max() <= slack
    if not isinstance(our, quantity_skew.Growing | quantity_skew.Sizes):
        assert np.array_equal(ours, others)


def apart(ours: list[float], others: list[float]) -> bool:
    """Kolmogorov and Smirnov's test of two samples, at the level 0.1 %: sup |F − G| > 1.95 √((n + m) / nm)."""
    every = np.sort([*ours, *others])
    gap = np.abs(
        np.searchsorted(np.sort(ours), every, "right") / len(ours)
        - np.searchsorted(np.sort(others), every, "right") / len(others)
    ).max()
    return bool(gap > 1.95 * np.sqrt((len(ours) + len(others)) / (len(ours) * len(others))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("our", "their"),
    [
        (
            label_skew.Dirichlet(6, 0.5),
            lambda theirs, seed: theirs.DirichletPartitioner(6, "kind", 0.5, 1, self_balancing=False, seed=seed),
        ),
        (
            label_skew.InnerDirichlet(6, 0.5),
            lambda theirs, seed: theirs.InnerDirichletPartitioner([50] * 6, "kind", 0.5, seed=seed),
        ),
        (
            label_skew.Pathological(10, 2, "first"),
            lambda theirs, seed: theirs.PathologicalPartitioner(10, "kind", 2, "first-deterministic", seed=seed),
        ),
        (
            label_skew.Pathological(10, 2, "random"),
            lambda theirs, seed: theirs.PathologicalPartitioner(10, "kind", 2, "random", seed=seed),
        ),
        (
            label_skew.Continuous(6, 0.5),
            lambda theirs, seed: theirs.ContinuousPartitioner(6, "kind", 0.5, seed=seed),
        ),
    ],
    ids=["dirichlet", "inner-dirichlet", "first", "random", "continuous"],
)
def test_distributions_are_as_theirs(our: Partitioner, their: Theirs, hub: Any, theirs: Any) -> None:
    """The size of a client and what it has of a class, over draws; a wrong α would be told apart."""
    ours = [of_ours(our, seed=seed) for seed in range(40)]
    others = [of_theirs(hub, their(theirs, seed)) for seed in range(40)]

    for measure in (lambda c: float(c[0].sum()), lambda c: float(c[0, 1]), lambda c: float(c[3].max())):
        assert not apart(list(map(measure, ours)), list(map(measure, others)))


def test_the_comparison_would_tell_another_alpha() -> None:
    ours, others = ([of_ours(label_skew.Dirichlet(6, a), seed=s) for s in range(40)] for a in (0.5, 5.0))

    assert apart([float(c[3].max()) for c in ours], [float(c[3].max()) for c in others])
