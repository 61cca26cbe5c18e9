"""Data for many clients: recipes by name or from arrays and files, and the shards that they give.

A :class:`Dataset` says what the rows are and how they are split; :meth:`Dataset.split` with a seed gives
:class:`FederatedData`, the shards. Public as ``shoal.datasets``. Fashion-MNIST: Xiao, Rasul and Vollgraf 2017
(arXiv 1708.07747), MIT licence.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final, overload

import numpy as np
import torch
from torch import Tensor

from shoal.client.data import Shard, Table, as_table, read_npz, table
from shoal.protos import registry
from shoal.protos.errors import DataError, ExperimentError, nearest
from shoal.protos.seeds import stream
from shoal.simulations.partitioners import Natural, Partitioner

__all__ = [
    "ArrayData",
    "Dataset",
    "FederatedData",
    "LazyData",
    "Numbered",
    "fashion_mnist",
    "fashion_mnist_subset",
    "from_arrays",
    "from_csv",
    "from_folder",
    "from_npz",
    "from_parquet",
    "from_shards",
    "load",
]

# MD5 of the unpacked files: the same whoever packed them.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
COMMON = ("client_test", "partition", "test_fraction", "test_path")


class FederatedData(ABC):
    """What the clients hold. Subclasses are final."""

    @property
    @abstractmethod
    def clients(self) -> Sequence[str]:
        """The population, in a fixed order."""

    @abstractmethod
    def shard(self, client: str) -> Shard:
        """One client's examples, at least one; DataError for an unknown client."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""

    @property
    def test(self) -> Shard | None:
        """The server's own test set."""
        return None

    @property
    def classes(self) -> int | None:
        """The number of classes; None where labels are no classes or it is not known."""
        return None


@final
@dataclass(frozen=True, eq=False)
class ArrayData(FederatedData):
    """Shards as views of two tensors whose rows are ordered by client: a shard costs no copy.

    ``offsets`` holds for each client ``(start, test_start, stop)``: rows from ``start`` to train on, from ``test_start``
    held out. DataError for a client without rows to train on.
    """

    x: Tensor
    y: Tensor
    offsets: Mapping[str, tuple[int, int, int]]
    test: Shard | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        for client, (start, middle, _) in self.offsets.items():
            if middle <= start:
                raise DataError(_no_examples(client))

    @cached_property
    def clients(self) -> Sequence[str]:
        return tuple(self.offsets)

    def shard(self, client: str) -> Shard:
        if client not in self.offsets:
            raise DataError(_unknown(client, self.clients))
        start, middle, stop = self.offsets[client]
        if middle == stop:
            return Shard(self.x[start:stop], self.y[start:stop])
        return Shard(self.x[start:middle], self.y[start:middle], self.x[middle:stop], self.y[middle:stop])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])


@final
@dataclass(frozen=True, eq=False)
class Numbered(Sequence[str]):
    """The clients ``"0"`` to ``"n-1"`` without holding them: a population of millions costs nothing."""

    n: int

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        numbers = range(self.n)[index]
        return str(numbers) if isinstance(numbers, int) else [str(number) for number in numbers]

    def __contains__(self, client: object) -> bool:
        return isinstance(client, str) and client.isdecimal() and str(int(client)) == client and int(client) < self.n


@final
@dataclass(frozen=True, eq=False)
class LazyData(FederatedData):
    """Shards made on demand by ``make_shard(client)``, which must give the same shard each time it is asked.

    Nothing is kept: a large population costs what its cohorts cost. Without ``example_shape`` the first client's shard is
    made to find it. DataError for a client without examples.
    """

    clients: Sequence[str] = field()
    make_shard: Callable[[str], Shard]
    test: Shard | None = None
    classes: int | None = None
    example_shape: tuple[int, ...] | None = None

    def shard(self, client: str) -> Shard:
        if client not in self._known:
            raise DataError(_unknown(client, self.clients))
        made = self.make_shard(client)
        if len(made) == 0:
            raise DataError(_no_examples(client))
        return made

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.example_shape or tuple(self.shard(self.clients[0]).x.shape[1:])

    @cached_property
    def _known(self) -> Sequence[str] | frozenset[str]:
        return self.clients if isinstance(self.clients, Numbered) else frozenset(self.clients)


@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows, and how to split them.

    Without ``partitioner`` the table's own clients are taken. ``client_test`` is the share of each shard that its
    client holds out to test on. ``spec`` is what stands under ``[data]`` in an experiment file that means the same; None
    where only Python can say it. DataError if the test set's examples have another shape.
    """

    train: Table
    test: Table | None = None
    partitioner: Partitioner | None = None
    client_test: float = 0.0
    spec: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_share("client_test", self.client_test)
        if self.partitioner is not None:
            registry.validate(self.partitioner, "data.partition")
        if self.test is not None and self.test.x.shape[1:] != self.train.x.shape[1:]:
            raise DataError(
                f"test examples have shape {list(self.test.x.shape[1:])}, but those to train on "
                f"{list(self.train.x.shape[1:])}; prepare both alike"
            )

    def split(self, seed: int) -> FederatedData:
        """The shards; the same seed gives the same ones. DataError if the partitioner cannot split the rows."""
        rng = stream(seed, "partition")
        shards = (self.partitioner or Natural()).split(self.train.y, self.train.clients, rng)
        offsets, order, start = {}, [], 0
        for client, rows in shards.items():
            # Each client keeps a row to train on, so that one with a single row still takes part.
            held = min(round(self.client_test * len(rows)), len(rows) - 1)
            mixed = rng.permutation(rows) if held > 0 else rows
            order += [np.sort(mixed[held:]), np.sort(mixed[:held])] if held > 0 else [rows]
            offsets[client] = (start, start + len(rows) - max(held, 0), start + len(rows))
            start += len(rows)
        rows = np.concatenate(order)
        test = None if self.test is None else Shard(_tensor(self.test.x), _tensor(self.test.y))
        return ArrayData(_tensor(self.train.x[rows]), _tensor(self.train.y[rows]), offsets, test, self.classes)

    @property
    def classes(self) -> int | None:
        """The number of classes in both tables; None for float labels."""
        labels = [part.y for part in (self.train, self.test) if part is not None]
        if any(y.dtype.kind == "f" for y in labels):
            return None
        return max(len(self.train.class_names or ()), *(int(y.max()) + 1 for y in labels))


def load(
    name: str,
    *,
    partition: Partitioner | Mapping[str, Any] | None = None,
    client_test: float = 0.0,
    test_fraction: float = 0.0,
    test_path: str | Path | None = None,
    **arguments: Any,
) -> Dataset:
    """A data set by name (``shoal data`` lists them) or ``"file.py:function"``, with its own arguments.

    The function returns a Table, ``(x, y)``, ``(x, y, clients)`` or ``(Table, test Table or None)``. The server's test set is
    what it returns (of an npz file, the arrays ``x_test`` and ``y_test``), or the file ``test_path``, or a share
    ``test_fraction`` of the rows, which are the same under every seed. ``partition`` is a partitioner or, as in an
    experiment file, ``{"kind": "dirichlet", "clients": 50, "alpha": 0.3}``.
    ExperimentError for unknown names and arguments, DataError for data that is not what it must be.
    """
    _check_known(name, arguments)
    train, test = _tables(registry.build("shoal.datasets", name, arguments, "data"), name)
    if name == "npz":
        test = _stored_test(train, arguments)
    if sum((test is not None, test_fraction != 0, test_path is not None)) > 1:
        raise ExperimentError(f"{name!r} would have two test sets; drop data.test_fraction or data.test_path")
    if test_path is not None:
        test = _test_file(name, train, {**arguments, "path": test_path})
    if test_fraction:
        train, test = _held_back(train, test_fraction)
    common = {"client_test": client_test or None, "test_fraction": test_fraction or None, "test_path": test_path}
    partitioner = _partitioner(partition)
    return Dataset(train, test, partitioner, client_test, _spec(name, {**arguments, **common}, partitioner))
