"""What many clients hold: shards in two tensors, or made on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final, overload

from torch import Tensor

from shoal.client.data import Shard
from shoal.protos.errors import DataError

__all__ = ["ArrayData", "FederatedData", "LazyData", "Numbered"]


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

    ``offsets`` holds for each client ``(start, test_start, stop)``: rows from ``start`` to train on, from
    ``test_start`` held out. DataError for a client without rows to train on.
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
        if not isinstance(client, str) or not client.isdecimal() or len(client) > len(str(self.n)):
            return False
        return str(int(client)) == client and int(client) < self.n


@final
class LazyData(FederatedData):
    """Shards made on demand by ``make_shard(client)``, which must give the same shard each time it is asked.

    Nothing is kept: a large population costs what its cohorts cost. Without ``shape`` the first client's shard is made
    to find it. DataError for an unknown client and for one without examples.
    """

    def __init__(
        self,
        clients: Sequence[str],
        make_shard: Callable[[str], Shard],
        test: Shard | None = None,
        *,
        classes: int | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self._clients, self._make, self._test, self._classes, self._shape = clients, make_shard, test, classes, shape
        self._known = clients if isinstance(clients, Numbered) else frozenset(clients)

    def shard(self, client: str) -> Shard:
        if client not in self._known:
            raise DataError(_unknown(client, self._clients))
        made = self._make(client)
        if len(made) == 0:
            raise DataError(_no_examples(client))
        return made

    @property
    def clients(self) -> Sequence[str]:
        return self._clients

    @property
    def test(self) -> Shard | None:
        return self._test

    @property
    def classes(self) -> int | None:
        return self._classes

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self._shape or tuple(self.shard(self._clients[0]).x.shape[1:])


def _no_examples(client: str) -> str:
    return f"client {client!r} has no examples to train on; leave it out, or raise the partitioner's min_examples"


def _unknown(client: str, clients: Sequence[str]) -> str:
    return f"there is no client {client!r} among {len(clients)} ({clients[0]!r} to {clients[-1]!r}); see data.clients"
