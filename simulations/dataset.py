"""A data set: what the rows are and how they are split, and the shards that come of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from shoal.client.data import Shard, Table
from shoal.protos import registry
from shoal.protos.errors import DataError, ExperimentError
from shoal.protos.seeds import stream
from shoal.simulations.federated import ArrayData, FederatedData, LazyData
from shoal.simulations.partitioners import Natural, Partitioner, Resampling, Split

__all__ = ["Dataset", "check_share"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows, and how to split them.

    Without ``partitioner`` the table's own clients are taken. ``client_test`` is the share of each shard that its
    client holds out to test on: at least one row, if it has two. ``client_noise`` σ makes features differ between
    clients: client i of N sees them with Gaussian noise of variance σ·i/N (NIID-Bench, Li et al. 2022, ICDE). ``spec``
    is what stands under ``[data]`` in an experiment file that means the same; None where only Python can say it.
    DataError if the test set has other shapes or class names, or if there are no floats to add noise to.
    """

    train: Table
    test: Table | None = None
    partitioner: Partitioner | None = None
    client_test: float = 0.0
    spec: Mapping[str, Any] | None = None
    client_noise: float = 0.0

    def __post_init__(self) -> None:
        check_share("client_test", self.client_test)
        if self.partitioner is not None:
            registry.validate(self.partitioner, "data.partition")
        number = isinstance(self.client_noise, int | float) and not isinstance(self.client_noise, bool)
        if not number or not 0 <= self.client_noise < math.inf:
            raise ExperimentError(f"'data.client_noise' is {self.client_noise!r}; it must be a number, from 0 on")
        if self.client_noise and self.train.x.dtype.kind != "f":
            raise DataError(f"'data.client_noise' needs features of float32, not {self.train.x.dtype}; drop it")
        if self.test is not None and self.test.x.shape[1:] != self.train.x.shape[1:]:
            raise DataError(
                f"test examples have shape {list(self.test.x.shape[1:])}, but those to train on "
                f"{list(self.train.x.shape[1:])}; prepare both alike"
            )
        if self.test is not None and self.test.class_names != self.train.class_names:
            raise DataError(
                f"test labels are named {self.test.class_names}, but those to train on {self.train.class_names}; "
                f"read both with the same class_names"
            )

    def __repr__(self) -> str:
        test = f" + {len(self.test)} to test on" if self.test is not None else ""
        return f"<Dataset {self.train}{test}, split by {self.partitioner or 'its own clients'}>"

    def split(self, seed: int) -> FederatedData:
        """The shards; the same seed gives the same ones. DataError if the partitioner cannot split the rows."""
        rng = stream(seed, "partition")
        split = (self.partitioner or Natural()).split(self.train.y, self.train.clients, rng)
        test = None if self.test is None else Shard(_tensor(self.test.x), _tensor(self.test.y))
        if isinstance(split, Resampling):
            make = _Draw(_tensor(self.train.x), _tensor(self.train.y), split, self.client_test, self.client_noise, seed)
            return LazyData(split.clients, make, test, classes=self.classes, shape=self.train.x.shape[1:])
        return self._arranged(split, test, rng, seed)

    def _arranged(self, split: Split, test: Shard | None, rng: np.random.Generator, seed: int) -> ArrayData:
        """Rows in the order of their clients, once, so that a shard is a view of them."""
        offsets, order, start = {}, list[np.ndarray](), 0
        for client, rows in split.items():
            held = _held(self.client_test, len(rows))
            mixed = rng.permutation(rows) if held else rows
            order += [np.sort(mixed[held:]), np.sort(mixed[:held])]
            offsets[client] = (start, start + len(rows) - held, start + len(rows))
            start += len(rows)
        rows = np.concatenate(order)
        x, y = _tensor(self.train.x[rows]), _tensor(self.train.y[rows])
        for number, (client, (start, _, stop)) in enumerate(offsets.items() if self.client_noise else (), start=1):
            x[start:stop] += _noise(self.client_noise * number / len(offsets), x[start:stop].shape, seed, client)
        return ArrayData(x, y, offsets, test, self.classes)

    @property
    def classes(self) -> int | None:
        """The number of classes in both tables; None for float labels."""
        labels = [part.y for part in (self.train, self.test) if part is not None]
        if any(y.dtype.kind == "f" for y in labels):
            return None
        return max(len(self.train.class_names or ()), *(int(y.max()) + 1 for y in labels))


@final
@dataclass(frozen=True, eq=False)
class _Draw:
    """Makes a client's shard when it is asked for. No closure, so that its tensors are shared among workers."""

    x: Tensor
    y: Tensor
    split: Resampling
    client_test: float
    noise: float
    seed: int

    def __call__(self, client: str) -> Shard:
        rows = torch.from_numpy(self.split[client])
        mixed = stream(self.seed, "held out", client=client).permutation(len(rows))
        rows, held = rows[mixed], _held(self.client_test, len(rows))
        x, y = self.x[rows], self.y[rows]
        if self.noise:
            x += _noise(self.noise * (int(client) + 1) / len(self.split), x.shape, self.seed, client)
        return Shard(x[held:], y[held:], x[:held], y[:held]) if held else Shard(x, y)


def check_share(name: str, value: float) -> None:
    """ExperimentError unless the value of ``data.name`` is a fraction below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ExperimentError(f"'data.{name}' is {value!r}; it must be a fraction, from 0 to below 1")


def _held(share: float, rows: int) -> int:
    """Each client keeps a row to train on, so that one with a single row still takes part."""
    return min(max(1, round(share * rows)), rows - 1) if share else 0


def _noise(variance: float, shape: tuple[int, ...], seed: int, client: str) -> Tensor:
    drawn = stream(seed, "noise", client=client).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(drawn * np.float32(variance**0.5))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
