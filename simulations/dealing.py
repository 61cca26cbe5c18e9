"""Dealing rows out: what partitioners share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shoal.protos.errors import DataError

__all__ = ["apportion", "check_enough", "classes_of", "deal", "is_class", "named", "rows_by_class", "take", "until"]

TRIES = 1000  # draws of sizes before a minimum per client counts as out of reach


def is_class(labels: np.ndarray) -> bool:
    """Whether labels are one class a row."""
    return labels.ndim == 1 and labels.dtype.kind in "iubU"


def classes_of(partitioner: object, labels: np.ndarray) -> np.ndarray:
    """Each row's class as 0, 1, …; DataError if labels are no classes."""
    if not is_class(labels):
        raise DataError(
            f"{partitioner} splits by class, but the labels are {labels.dtype}{list(labels.shape)}; "
            f"split by 'iid', 'quantity-skew' or 'natural', or give integer labels"
        )
    return np.unique(labels, return_inverse=True)[1]


def rows_by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of each class, in random order."""
    _, classes = np.unique(labels, return_inverse=True)
    rows = rng.permutation(len(labels))
    return np.split(rows[np.argsort(classes[rows], kind="stable")], np.cumsum(np.bincount(classes))[:-1])


def check_enough(partitioner: object, clients: int, rows: int, each: int = 1) -> None:
    """DataError unless every client can get so many rows."""
    if clients * each > rows:
        raise DataError(
            f"{partitioner} needs at least {clients} × {each} rows, but there are {rows}; lower data.partition.clients"
            + (" or the number each must get" if each > 1 else "")
        )


def apportion(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Whole numbers ``[C, N]``, each within 1 of its share of ``totals`` ``[C]``, that sum to what the shares do."""
    cuts = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
    return np.diff(cuts, axis=1, prepend=0)


def until(partitioner: object, draw: Callable[[], np.ndarray], least: int, rows: int) -> np.ndarray:
    """The first draw of counts ``[C, N]`` that gives every client ``least`` rows."""
    for _ in range(TRIES):
        counts = draw()
        if counts.sum(0).min() >= least:
            return counts
    raise DataError(
        f"{partitioner}: none of {TRIES} draws over {rows} rows gave every client min_examples={least}; "
        f"raise data.partition.alpha, or lower clients or min_examples"
    )


def take(left: np.ndarray, mix: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
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


def deal(partitioner: object, groups: Sequence[np.ndarray], counts: np.ndarray) -> Mapping[str, np.ndarray]:
    """Deal each group of rows out by its line of ``counts`` ``[C, N]``: the shards of N numbered clients.

    DataError for a client that would get nothing.
    """
    empty = np.flatnonzero(counts.sum(0) == 0)
    if len(empty):
        raise DataError(
            f"{partitioner} leaves client '{empty[0]}' without a row of {sum(map(len, groups))}; "
            f"lower data.partition.clients, or make the shards less unequal"
        )
    # np.split makes one piece more than there are clients: what is left over.
    parts = [np.split(rows, np.cumsum(line)) for rows, line in zip(groups, counts, strict=True)]
    return named([np.concatenate([part[client] for part in parts]) for client in range(counts.shape[1])])


def named(shards: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Clients ``"0"``, ``"1"``, … with their rows in order."""
    return {str(client): np.sort(rows) for client, rows in enumerate(shards)}
