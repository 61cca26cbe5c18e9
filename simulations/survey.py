"""How data lies among clients, before anything is trained: sizes, mixes of labels, and how far these are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from shoal.client.data import Shard
from shoal.simulations.federated import ArrayData, FederatedData

__all__ = ["Survey", "survey"]


@final
@dataclass(frozen=True, eq=False)
class Survey:
    """Some or all clients of a population: how many rows each trains on and holds out ``[N]``.

    ``counts`` ``[N, C]`` of the labels 0, 1, … to train on (a sequence counts each of its labels), ``test_counts``
    ``[C]`` of the server's test set; None where labels are no classes.
    """

    clients: Sequence[str]
    sizes: np.ndarray
    held_out: np.ndarray
    counts: np.ndarray | None
    population: int
    test: int = 0
    test_counts: np.ndarray | None = None

    @cached_property
    def divergences(self) -> np.ndarray | None:
        """The Jensen-Shannon divergence of each client's mix from that of all surveyed, in bits ``[N]``: 0 to 1."""
        if self.counts is None:
            return None
        mixes, overall = self._mixes(self.counts)
        middle = (mixes + overall) / 2
        common = np.broadcast_to(overall, mixes.shape)
        return np.asarray((_relative_entropy(mixes, middle) + _relative_entropy(common, middle)) / 2)

    def summary(self) -> dict[str, float]:
        """How uneven the split is: sizes, the effective number of clients (Σn)²/Σn² and, with classes, the mixes.

        ``total_variation`` is the mean over clients of ½ Σ|mix − global mix|: 0 is IID, near 1 one rare class a client.
        ``divergence`` is the mean of :attr:`divergences`, beside their 5th and 95th percentile.
        """
        result = {"clients": float(len(self.sizes)), "examples": float(self.sizes.sum()), **_spread("size", self.sizes)}
        result["effective_clients"] = float(self.sizes.sum() ** 2 / (self.sizes.astype(np.float64) ** 2).sum())
        if self.counts is None or self.divergences is None:
            return result
        mixes, overall = self._mixes(self.counts)
        result |= _spread("classes", (self.counts > 0).sum(1))
        result["total_variation"] = float(np.abs(mixes - overall).sum(1).mean() / 2)
        low, high = np.quantile(self.divergences, [0.05, 0.95])
        return result | {
            "divergence": float(self.divergences.mean()),
            "divergence_p5": float(low),
            "divergence_p95": float(high),
        }

    @staticmethod
    def _mixes(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()


def survey(data: FederatedData, most: int | None = None) -> Survey:
    """Look at all clients, or at ``most`` of them, evenly spaced: of a large population that is enough."""
    every = max(1, -(-len(data.clients) // most)) if most else 1
    clients = data.clients[::every]
    test, classes = data.test, data.classes
    sizes, held_out, counts = _of_arrays(data, clients) if isinstance(data, ArrayData) else _one_by_one(data, clients)
    test_counts = _counts(test.y, classes) if test is not None and _are_classes(test.y, classes) else None
    rows = 0 if test is None else len(test)
    return Survey(clients, sizes, held_out, counts, len(data.clients), rows, test_counts)


Look = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # sizes, rows held out, counts of labels


def _of_arrays(data: ArrayData, clients: Sequence[str]) -> Look:
    """Without making a shard."""
    bounds = np.array([data.offsets[client] for client in clients])
    sizes, held_out = bounds[:, 1] - bounds[:, 0], bounds[:, 2] - bounds[:, 1]
    if not _are_classes(data.y, data.classes):
        return sizes, held_out, None
    parts = [_counts(data.y[start:middle], data.classes) for start, middle, _ in bounds.tolist()]
    return sizes, held_out, np.stack(parts)


def _one_by_one(data: FederatedData, clients: Sequence[str]) -> Look:
    sizes, held_out, counts = list[int](), list[int](), list[np.ndarray]()
    for client in clients:
        shard: Shard = data.shard(client)
        sizes.append(len(shard))
        held_out.append(0 if shard.held_out is None else len(shard.held_out))
        if _are_classes(shard.y, data.classes):
            counts.append(_counts(shard.y, data.classes))
    return np.array(sizes), np.array(held_out), np.stack(counts) if len(counts) == len(sizes) else None


def _are_classes(y: Tensor, classes: int | None) -> bool:
    return classes is not None and not y.dtype.is_floating_point and bool(((y >= 0) & (y < classes)).all())


def _counts(y: Tensor, classes: int | None) -> np.ndarray:
    return torch.bincount(y.reshape(-1), minlength=classes or 0).numpy()


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    values = np.sort(values)
    return {
        f"{name}_min": float(values[0]),
        f"{name}_median": float(np.median(values)),
        f"{name}_max": float(values[-1]),
    }


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Σ p log₂(p/q) of each line, with 0 log 0 = 0."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(1))
