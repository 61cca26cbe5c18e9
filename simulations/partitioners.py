"""Partitioners: how one table becomes the shards of many clients.

Two different splits are both called "Dirichlet" in papers; :class:`Dirichlet` and :class:`DirichletMix` say which is
which. :func:`describe` sums up a split.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, final

import numpy as np
from annotated_types import Gt, Lt

from shoal.protos.errors import DataError

__all__ = ["Dirichlet", "DirichletMix", "Iid", "Natural", "Partitioner", "QuantitySkew", "Shards", "describe"]

Alpha = Annotated[float, Gt(0), Lt(math.inf)]
Count = Annotated[int, Gt(0)]
Split = dict[str, np.ndarray]
TRIES = 1000  # draws of sizes before a minimum per client counts as out of reach


class Partitioner(ABC):
    """Splits rows among clients. Subclasses are final frozen dataclasses of hyper-parameters."""

    @abstractmethod
    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        """The sorted row numbers of each client; every row goes to at most one client, every client gets a row.

        ``labels`` ``[n, ...]`` and, where the data names its clients, ``clients`` ``[n]``. DataError if the rows
        cannot be split so.
        """


@final
@dataclass(frozen=True)
class Iid(Partitioner):
    """Rows at random, shards of equal size (± 1): the easy case that others are measured against."""

    clients: Count

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        _check_enough(self, self.clients, len(labels))
        return _named(np.array_split(rng.permutation(len(labels)), self.clients))


@final
@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """For each class, its rows over clients ~ Dir(α, …, α): both the mix of classes and the sizes differ.

    Yurochkin et al. 2019 (ICML); the label skew of NIID-Bench (Li et al. 2022, ICDE) and of flwr-datasets. α → ∞ is
    IID, α = 0.1 is strong, α → 0 gives each class to one client. Drawn again until each client has ``min_examples``.
    :class:`DirichletMix` draws the other way round, for each client over classes, with equal sizes; the same α means
    something else there.
    """

    clients: Count
    alpha: Alpha
    min_examples: Count = 1

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        _check_enough(self, self.clients, len(labels), self.min_examples)
        per_class = np.bincount(_classes(self, labels))

        def draw() -> np.ndarray:
            shares = rng.dirichlet(np.full(self.clients, self.alpha), size=len(per_class))
            return _apportion(per_class, shares)

        counts = _until(self, draw, self.min_examples, len(labels))
        return _named(_deal(_rows_by_class(labels, rng), counts))


@final
@dataclass(frozen=True)
class DirichletMix(Partitioner):
    """For each client, its mix of classes ~ Dir(α·p), where p is the mix in the whole data; sizes are equal.

    Hsu, Qi and Brown 2019 (arXiv 1909.06335). Rows are drawn without replacement: once a class is used up, the
    mixes of later clients are renormalised over the others. Up to ``clients`` - 1 rows are left over.

    Unlike :class:`Dirichlet`, which draws for each class over clients, only the mix differs, not the sizes. α is the
    *total* concentration, spread over p: with ten equal classes, α = 1 here is a parameter of 0.1 a class.
    """

    clients: Count
    alpha: Alpha

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        _check_enough(self, self.clients, len(labels))
        left = np.bincount(_classes(self, labels))
        mixes = rng.dirichlet(self.alpha * left / left.sum(), size=self.clients)
        counts = np.empty((len(left), self.clients), dtype=np.int64)
        for client, mix in enumerate(mixes):
            counts[:, client] = _take(left, mix, len(labels) // self.clients, rng)
            left = left - counts[:, client]
        return _named(_deal(_rows_by_class(labels, rng), counts))


@final
@dataclass(frozen=True)
class Shards(Partitioner):
    """Rows sorted by label, cut into equal pieces, ``shards_per_client`` pieces to each client at random.

    McMahan et al. 2017 (AISTATS), section 3: with two pieces most clients know two classes. A piece that crosses from
    one class to the next brings both.
    """

    clients: Count
    shards_per_client: Count = 2

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        count = self.clients * self.shards_per_client
        _classes(self, labels)
        _check_enough(self, self.clients, len(labels), self.shards_per_client)
        pieces = np.array_split(np.concatenate(_rows_by_class(labels, rng)), count)
        dealt = rng.permutation(count).reshape(self.clients, -1)
        return _named([np.concatenate([pieces[i] for i in mine]) for mine in dealt])


@final
@dataclass(frozen=True)
class QuantitySkew(Partitioner):
    """Rows at random, sizes ~ Dir(α, …, α): only the amount of data differs (NIID-Bench, Li et al. 2022, ICDE).

    Drawn again until each client has ``min_examples``.
    """

    clients: Count
    alpha: Alpha
    min_examples: Count = 1

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        _check_enough(self, self.clients, len(labels), self.min_examples)
        total = np.array([len(labels)])
        sizes = _until(
            self,
            lambda: _apportion(total, rng.dirichlet(np.full(self.clients, self.alpha), size=1)),
            self.min_examples,
            len(labels),
        )
        return _named(_deal([rng.permutation(len(labels))], sizes))


@final
@dataclass(frozen=True)
class Natural(Partitioner):
    """The data's own clients, sorted by id; those with fewer than ``min_examples`` rows are left out."""

    min_examples: Count = 1

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        if clients is None:
            raise DataError(
                "the data does not name its clients: give the column or array that does (client=, clients=), "
                "or a partition such as {kind = 'iid', clients = 10}"
            )
        names, owner = np.unique(clients, return_inverse=True)
        sizes = np.bincount(owner)
        groups = np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])
        found = {str(n): g for n, g in zip(names.tolist(), groups, strict=True) if len(g) >= self.min_examples}
        if not found:
            raise DataError(
                f"{self}: the largest of {len(names)} clients has {sizes.max()} rows; lower data.partition.min_examples"
            )
        return found


def describe(shards: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """How uneven a split is: sizes, the effective number of clients (Σn)²/Σn² and the mix where labels are classes.

    ``total_variation`` is the mean over clients of ½ Σ|mix − global mix|: 0 is IID, near 1 one rare class a client.
    """
    sizes = np.array([len(rows) for rows in shards.values()])
    result = {"clients": float(len(sizes)), "examples": float(sizes.sum()), **_spread("size", sizes)}
    result["effective_clients"] = float(sizes.sum() ** 2 / (sizes.astype(np.float64) ** 2).sum())
    if not _is_class(labels):
        return result
    _, classes = np.unique(labels, return_inverse=True)
    width = int(classes.max()) + 1
    owner = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.concatenate(list(shards.values()))
    table = np.bincount(owner * width + classes[rows], minlength=len(sizes) * width).reshape(-1, width)
    mixes, overall = table / sizes[:, None], table.sum(0) / sizes.sum()
    result |= _spread("classes", (table > 0).sum(1))
    result["total_variation"] = float(np.abs(mixes - overall).sum(1).mean() / 2)
    return result


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    values = np.sort(values)
    return {
        f"{name}_min": float(values[0]),
        f"{name}_median": float(np.median(values)),
        f"{name}_max": float(values[-1]),
    }


def _is_class(labels: np.ndarray) -> bool:
    return labels.ndim == 1 and labels.dtype.kind in "iubU"


def _classes(partitioner: Partitioner, labels: np.ndarray) -> np.ndarray:
    """Each row's class as 0, 1, …; DataError if labels are no classes."""
    if not _is_class(labels):
        raise DataError(
            f"{partitioner} splits by class, but the labels are {labels.dtype}{list(labels.shape)}; "
            f"split by 'iid', 'quantity-skew' or 'natural', or give integer labels"
        )
    return np.unique(labels, return_inverse=True)[1]


def _rows_by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of each class, in random order."""
    _, classes = np.unique(labels, return_inverse=True)
    rows = rng.permutation(len(labels))
    return np.split(rows[np.argsort(classes[rows], kind="stable")], np.cumsum(np.bincount(classes))[:-1])


def _check_enough(partitioner: Partitioner, clients: int, rows: int, each: int = 1) -> None:
    if clients * each > rows:
        raise DataError(
            f"{partitioner} needs at least {clients} × {each} rows, but there are {rows}; lower data.partition.clients"
            + (" or the number each must get" if each > 1 else "")
        )


def _apportion(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Whole numbers ``[C, N]`` with rows that sum to ``totals`` ``[C]``, each within 1 of its share."""
    cuts = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
    cuts[:, -1] = totals  # the cumulated shares end a rounding error away from 1
    return np.diff(cuts, axis=1, prepend=0)


def _until(partitioner: Partitioner, draw: Callable[[], np.ndarray], least: int, rows: int) -> np.ndarray:
    """The first draw of counts ``[C, N]`` that gives every client ``least`` rows."""
    for _ in range(TRIES):
        counts = draw()
        if counts.sum(0).min() >= least:
            return counts
    raise DataError(
        f"{partitioner}: none of {TRIES} draws over {rows} rows gave every client min_examples={least}; "
        f"raise data.partition.alpha, or lower clients or min_examples"
    )


def _take(left: np.ndarray, mix: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """How many of each class one client gets, of those that are ``left``.

    Exactly as if drawn one by one: a draw from a class that is used up is made again over the others.
    """
    taken = np.zeros_like(left)
    while taken.sum() < size:
        open_ = left > taken
        weights = np.where(open_, mix, 0.0)
        if weights.sum() == 0:  # all the classes it wants are used up
            weights = (left - taken).astype(np.float64)
        drawn = rng.multinomial(size - taken.sum(), weights / weights.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _deal(groups: list[np.ndarray], counts: np.ndarray) -> list[np.ndarray]:
    """Deal each group of rows out by its line of ``counts`` ``[C, N]``; the rows of each of N clients."""
    # np.split makes one piece more than there are clients: what is left over.
    parts = [np.split(rows, np.cumsum(line)) for rows, line in zip(groups, counts, strict=True)]
    return [np.concatenate([part[client] for part in parts]) for client in range(counts.shape[1])]


def _named(shards: list[np.ndarray]) -> Split:
    return {str(client): np.sort(rows) for client, rows in enumerate(shards)}
