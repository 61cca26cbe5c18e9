"""Data for many clients: recipes by name or from arrays and files, and the shards that they give.

A :class:`Dataset` says what the rows are and how they are split; :meth:`Dataset.split` with a seed gives
:class:`FederatedData`, the shards. Public as ``shoal.datasets``.
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.client.data import Table, as_table, table
from shoal.client.hub import columns, partitions
from shoal.client.readers import read_npz
from shoal.protos import registry
from shoal.protos.errors import DataError, ExperimentError, nearest
from shoal.protos.seeds import stream
from shoal.simulations.dataset import Dataset, check_share
from shoal.simulations.federated import ArrayData, FederatedData, LazyData, Numbered
from shoal.simulations.partitioners import Partitioner

__all__ = [
    "ArrayData",
    "Dataset",
    "FederatedData",
    "LazyData",
    "Numbered",
    "from_arrays",
    "from_csv",
    "from_flwr",
    "from_folder",
    "from_huggingface",
    "from_npz",
    "from_parquet",
    "from_shards",
    "load",
]

COMMON = ("client_noise", "client_test", "partition", "test_fraction", "test_path")


def load(
    name: str,
    *,
    partition: Partitioner | Mapping[str, Any] | None = None,
    client_test: float = 0.0,
    client_noise: float = 0.0,
    test_fraction: float = 0.0,
    test_path: str | Path | None = None,
    **arguments: Any,
) -> Dataset:
    """A data set by name or ``"file.py:function"``, with its own arguments.

    The function returns a Table, ``(x, y)``, ``(x, y, clients)`` or ``(Table, test Table or None)``. The server's test
    set is what it returns (of an npz file, the arrays ``x_test`` and ``y_test``), or the file ``test_path``, or a share
    ``test_fraction`` of the rows, which are the same under every seed. ``partition`` is a partitioner or, as in an
    experiment file, ``{"kind": "dirichlet", "clients": 50, "alpha": 0.3}``.
    ExperimentError for unknown names and arguments, DataError for data that is not what it must be.
    """
    _check_known(name, arguments)
    train, test = _train_and_test(name, arguments, test_fraction, test_path)
    partitioner = _partitioner(partition)
    fractions = {"client_test": client_test, "client_noise": client_noise, "test_fraction": test_fraction}
    common = {key: value or None for key, value in fractions.items()} | {"test_path": test_path}
    spec = _spec(name, {**arguments, **common}, partitioner)
    return Dataset(train, test, partitioner, client_test, spec, client_noise)


def from_arrays(
    x: Any,
    y: Any,
    clients: Any = None,
    partition: Partitioner | Mapping[str, Any] | None = None,
    test: tuple[Any, Any] | Table | None = None,
    client_test: float = 0.0,
    client_noise: float = 0.0,
    **options: Any,
) -> Dataset:
    """Rows from numpy, torch, lists or pandas; ``options`` are those of :func:`shoal.client.data.table`."""
    train = table(x, y, clients, **options)
    test = _test_like(train, test, options)
    return Dataset(train, test, _partitioner(partition), client_test, client_noise=client_noise)


def from_shards(
    shards: Mapping[str, tuple[Any, Any]],
    test: tuple[Any, Any] | Table | None = None,
    client_test: float = 0.0,
    **options: Any,
) -> Dataset:
    """``{client: (x, y)}``, as :func:`from_arrays`; DataError for a client that has no rows or is unlike the first."""
    if not shards:
        raise DataError("there are no shards; give at least one client")
    parts = {client: table(*pair, where=f"client {client!r}", **options) for client, pair in shards.items()}
    names = {name for part in parts.values() for name in part.class_names or ()}
    if names and "class_names" not in options:  # numbered alike only once all clients' classes are known
        return from_shards(shards, test, client_test, class_names=sorted(names), **options)
    first = next(iter(parts.values()))
    for client, part in parts.items():
        if _kind(part) != _kind(first):
            raise DataError(f"client {client!r} has {_kind(part)}, the first client {_kind(first)}; prepare all alike")
    ids = np.repeat(np.array(list(parts), dtype=np.str_), [len(part) for part in parts.values()])
    x, y = (np.concatenate([getattr(part, name) for part in parts.values()]) for name in ("x", "y"))
    train = Table(x, y, ids, first.class_names)
    return Dataset(train, _test_like(train, test, options), client_test=client_test)


def from_csv(
    path: str | Path, label: str, client: str | None = None, features: Sequence[str] | None = None, **options: Any
) -> Dataset:
    """A CSV file (:func:`shoal.client.readers.read_csv`); ``options`` are those of :func:`load`."""
    return load("csv", path=path, label=label, client=client, features=features, **options)


def from_parquet(
    path: str | Path, label: str, client: str | None = None, features: Sequence[str] | None = None, **options: Any
) -> Dataset:
    """A Parquet file (:func:`shoal.client.readers.read_parquet`); ``options`` are those of :func:`load`."""
    return load("parquet", path=path, label=label, client=client, features=features, **options)


def from_npz(path: str | Path, x: str = "x", y: str = "y", clients: str | None = None, **options: Any) -> Dataset:
    """An npz file (:func:`shoal.client.readers.read_npz`); ``options`` are those of :func:`load`."""
    return load("npz", path=path, x=x, y=y, clients=clients, **options)


def from_folder(path: str | Path, size: int | None = None, clients: bool = False, **options: Any) -> Dataset:
    """A folder of images (:func:`shoal.client.readers.read_image_folder`); ``options`` are those of :func:`load`."""
    return load("image-folder", path=path, size=size, clients=clients, **options)


def from_huggingface(
    dataset: Any, x: str | Sequence[str], y: str, client: str | None = None, test: Any = None, **options: Any
) -> Dataset:
    """A ``datasets.Dataset``, and one to test on: see :func:`shoal.client.hub.columns`; ``options`` of from_arrays."""
    read, tested = columns(dataset, x, y, client), None if test is None else columns(test, x, y)
    made = from_arrays(*read[:3], test=None if tested is None else tested[:2], **options)
    return _called(made, read.class_names)


def from_flwr(
    source: Any, x: str | Sequence[str], y: str, split: str = "train", test: Any = None, **options: Any
) -> Dataset:
    """What a ``FederatedDataset`` or a partitioner of flwr-datasets has split, its partitions being the clients.

    ``test`` is the name of a split of the FederatedDataset, or a ``datasets.Dataset``; ``options`` are those of
    from_shards. See :func:`shoal.client.hub.partitions`.
    """
    read = {client: columns(part, x, y) for client, part in partitions(source, split).items()}
    table_of_test = source.load_split(test) if isinstance(test, str) else test
    tested = None if test is None else columns(table_of_test, x, y)[:2]
    made = from_shards({client: part[:2] for client, part in read.items()}, tested, **options)
    return _called(made, next(iter(read.values())).class_names)


def _called(data: Dataset, names: tuple[str, ...] | None) -> Dataset:
    """With names for classes that came as numbers."""
    if names is None:
        return data
    test = None if data.test is None else replace(data.test, class_names=names)
    return replace(data, train=replace(data.train, class_names=names), test=test)


def _kind(part: Table) -> str:
    return f"x {part.x.dtype}{list(part.x.shape[1:])} and y {part.y.dtype}{list(part.y.shape[1:])}"


def _check_known(name: str, arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(registry.load("shoal.datasets", name)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in arguments:  # the registry knows the reader's own keys only, and "partiton" is a likely slip
        if key not in parameters:
            raise ExperimentError(f"unknown key 'data.{key}' for {name!r}{nearest(key, [*parameters, *COMMON])}")


def _train_and_test(
    name: str, arguments: dict[str, Any], fraction: float, path: str | Path | None
) -> tuple[Table, Table | None]:
    """The rows, and the server's test set from the one place that has it."""
    train, test = _read(name, arguments)
    if name == "npz":
        test = _stored_test(train, arguments)
    if sum((test is not None, fraction != 0, path is not None)) > 1:
        raise ExperimentError(f"{name!r} would have two test sets; drop data.test_fraction or data.test_path")
    if path is not None:
        return train, _test_file(name, train, {**arguments, "path": path})
    return _held_back(train, fraction) if fraction else (train, test)


def _read(name: str, arguments: Mapping[str, Any]) -> tuple[Table, Table | None]:
    result = registry.build("shoal.datasets", name, arguments, "data")
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Table):
        return result[0], None if result[1] is None else as_table(result[1], name)
    return as_table(result, name), None


def _stored_test(train: Table, arguments: Mapping[str, Any]) -> Table | None:
    path = Path(arguments["path"]).expanduser()
    with zipfile.ZipFile(path) as archive:
        if not {"x_test.npy", "y_test.npy"} <= set(archive.namelist()):
            return None
    return read_npz(path, "x_test", "y_test", dtype=arguments.get("dtype", "float32"), class_names=train.class_names)


def _test_file(name: str, train: Table, arguments: dict[str, Any]) -> Table:
    parameters = inspect.signature(registry.load("shoal.datasets", name)).parameters
    if "path" not in parameters:
        raise ExperimentError(
            f"'data.test_path' is set, but {name!r} reads no path; drop it, or set data.test_fraction"
        )
    if "class_names" in parameters:  # a class that only one file knows must not shift the numbers of the others
        arguments["class_names"] = train.class_names
    return _read(name, arguments)[0]


def _test_like(train: Table, test: tuple[Any, Any] | Table | None, options: Mapping[str, Any]) -> Table | None:
    if test is None or isinstance(test, Table):
        return test
    return table(*test, **{**options, "class_names": train.class_names, "where": "test"})


def _held_back(train: Table, fraction: float) -> tuple[Table, Table]:
    """The rows to train on and those to test on, the same under every seed."""
    check_share("test_fraction", fraction)
    rows, count = stream(0, "test").permutation(len(train)), round(fraction * len(train))
    if not 0 < count < len(train):
        raise DataError(
            f"'data.test_fraction' = {fraction} of {len(train)} rows is {count}; it must leave rows on both sides"
        )
    return train.take(np.sort(rows[count:])), train.take(np.sort(rows[:count]))


def _partitioner(partition: Partitioner | Mapping[str, Any] | None) -> Partitioner | None:
    if partition is None or isinstance(partition, Partitioner):
        return partition
    arguments = dict(partition) if isinstance(partition, Mapping) else {}
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str):
        known = ", ".join(registry.names("shoal.partitioners"))
        raise ExperimentError(
            f"'data.partition' is {partition!r}, without a kind; write {{kind = …}} with one of {known}"
        )
    made = registry.build("shoal.partitioners", kind, arguments, "data.partition")
    if not isinstance(made, Partitioner):
        raise ExperimentError(f"'data.partition.kind' is {kind!r}, which is no Partitioner; derive it from Partitioner")
    return made


def _spec(name: str, arguments: Mapping[str, Any], partitioner: Partitioner | None) -> dict[str, Any] | None:
    """What to write under ``[data]``; paths as Path, so that the file's writer can make them absolute."""
    spec = {"name": name} | {key: value for key, value in arguments.items() if value is not None}
    if partitioner is not None:
        described = registry.describe("shoal.partitioners", partitioner)
        if described is None:
            return None
        spec["partition"] = {"kind": described.pop("name"), **described}
    spec |= {key: Path(spec[key]).expanduser() for key in ("path", "test_path") if key in spec}
    return spec if _plain(spec) else None


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, int | float | str | Path)
