"""Partitioners: how one table becomes the shards of many clients.

Here those that look at no label; :mod:`shoal.simulations.label_skew` and :mod:`shoal.simulations.quantity_skew` have
the others. A split of features instead of rows (vertical) is none of these: its clients hold parts of the same examples
and of the model, and no strategy here trains so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, final

import numpy as np
from annotated_types import Gt, Lt

from shoal.protos.errors import DataError
from shoal.protos.seeds import stream
from shoal.simulations.dealing import check_enough, classes_of, named, take
from shoal.simulations.federated import Numbered

__all__ = [
    "Alpha",
    "Count",
    "GroupedNatural",
    "Iid",
    "Natural",
    "Partitioner",
    "Resampled",
    "Resampling",
    "Split",
]

Alpha = Annotated[float, Gt(0), Lt(math.inf)]
Count = Annotated[int, Gt(0)]
Split = Mapping[str, np.ndarray]


class Partitioner(ABC):
    """Splits rows among clients. Subclasses are final frozen dataclasses of hyper-parameters."""

    @abstractmethod
    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        """The sorted row numbers of each client; every row goes to at most one client, every client gets a row.

        ``labels`` ``[n, ...]`` and, where the data names its clients, ``clients`` ``[n]``. DataError if the rows
        cannot be split so. Only :class:`Resampled` gives a row to several.
        """


@final
@dataclass(frozen=True)
class Iid(Partitioner):
    """Rows at random, shards of equal size (± 1): the easy case that others are measured against."""

    clients: Count

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        check_enough(self, self.clients, len(labels))
        return named(np.array_split(rng.permutation(len(labels)), self.clients))


@final
@dataclass(frozen=True)
class Natural(Partitioner):
    """The data's own clients, sorted by id; those with fewer than ``min_examples`` rows are left out."""

    min_examples: Count = 1

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        shards = _by_id(clients)
        found = {name: rows for name, rows in shards.items() if len(rows) >= self.min_examples}
        if not found:
            raise DataError(
                f"{self}: the largest of {len(shards)} clients has {max(map(len, shards.values()))} rows; "
                f"lower data.partition.min_examples"
            )
        return found


@final
@dataclass(frozen=True)
class GroupedNatural(Partitioner):
    """The data's own clients, sorted by id, ``group_size`` of them together as one.

    Where their number does not divide, the rest are a group of their own (``rest="smaller"``), spread over the groups
    (``"bigger"``), left out (``"drop"``) or an error (``"refuse"``). Groups are numbered.
    """

    group_size: Count
    rest: Literal["smaller", "bigger", "drop", "refuse"] = "smaller"

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        shards = list(_by_id(clients).values())
        whole, over = divmod(len(shards), self.group_size)
        if (over and self.rest == "refuse") or whole + (self.rest == "smaller") == 0:
            raise DataError(f"{self}: there are {len(shards)} clients; choose another data.partition.group_size")
        cuts = np.arange(self.group_size, len(shards), self.group_size)
        if over and self.rest == "drop":
            shards = shards[:-over]
            cuts = cuts[:-1]
        elif over and self.rest == "bigger":
            cuts = np.cumsum([len(part) for part in np.array_split(np.arange(len(shards)), whole)])[:-1]
        bounds = [0, *cuts.tolist(), len(shards)]
        return named([np.concatenate(shards[start:stop]) for start, stop in pairwise(bounds)])


@final
@dataclass(frozen=True)
class Resampled(Partitioner):
    """A population of any size: each client draws ``size`` different rows for itself, when it is asked.

    With ``alpha`` its mix of classes ~ Dir(α·p), as that of ``DirichletMix``; without, it is that of the whole data.
    The one split in which clients share rows: a million of them cost nothing.
    """

    clients: Count
    size: Count
    alpha: Alpha | None = None

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        check_enough(self, 1, len(labels), self.size)
        classes = np.zeros(len(labels), np.int64) if self.alpha is None else classes_of(self, labels)
        counts = np.bincount(classes)
        prior = (self.alpha or 1.0) * counts / counts.sum()
        groups = tuple(np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1]))
        return Resampling(Numbered(self.clients), self.size, groups, prior, int(rng.integers(2**62)))


@final
@dataclass(frozen=True, eq=False)
class Resampling(Mapping[str, np.ndarray]):
    """Shards that are drawn when asked for, the same each time; ``groups`` are the rows of each class."""

    clients: Sequence[str]
    size: int
    groups: tuple[np.ndarray, ...]
    prior: np.ndarray
    key: int

    def __getitem__(self, client: str) -> np.ndarray:
        if client not in self.clients:
            raise KeyError(client)
        rng = stream(self.key, "resampled", client=client)
        left = np.array([len(group) for group in self.groups])
        counts = take(left, rng.dirichlet(self.prior), self.size, rng)
        drawn = [rng.choice(group, n, replace=False) for group, n in zip(self.groups, counts, strict=True) if n]
        return np.sort(np.concatenate(drawn))

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


def _by_id(clients: np.ndarray | None) -> dict[str, np.ndarray]:
    """The rows of each of the data's own clients; DataError if it names none."""
    if clients is None:
        raise DataError(
            "the data does not name its clients: give the column or array that does (client=, clients=), "
            "or a partition such as {kind = 'iid', clients = 10}"
        )
    names, owner = np.unique(clients, return_inverse=True)
    groups = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    return {str(name): rows for name, rows in zip(names.tolist(), groups, strict=True)}
