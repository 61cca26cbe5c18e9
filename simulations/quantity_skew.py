"""Partitioners under which only the amount of data differs: rows at random, sizes by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from shoal.protos.errors import DataError
from shoal.simulations.dealing import apportion, check_enough, deal, until
from shoal.simulations.partitioners import Alpha, Count, Partitioner, Split

__all__ = ["Growing", "QuantitySkew", "Sizes"]


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
        check_enough(self, self.clients, len(labels), self.min_examples)
        total = np.array([len(labels)])
        sizes = until(
            self,
            lambda: apportion(total, rng.dirichlet(np.full(self.clients, self.alpha), size=1)),
            self.min_examples,
            len(labels),
        )
        return deal(self, [rng.permutation(len(labels))], sizes)


@final
@dataclass(frozen=True)
class Growing(Partitioner):
    """Rows at random, the size of client i = 1, 2, … ∝ i, i² or eⁱ: the sizes of flwr-datasets.

    ``by`` is ``"linear"``, ``"square"`` or ``"exponential"``; under the last, one client has two thirds of all rows.
    """

    clients: Count
    by: Literal["linear", "square", "exponential"] = "linear"

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        number = np.arange(1.0, self.clients + 1)
        # From the last one's size down, since e^710 is infinite.
        grown = {"linear": number, "square": number**2, "exponential": np.exp(number - self.clients)}[self.by]
        sizes = apportion(np.array([len(labels)]), grown[None] / grown.sum())
        return deal(self, [rng.permutation(len(labels))], sizes)


@final
@dataclass(frozen=True)
class Sizes(Partitioner):
    """Rows at random, as many to each client as ``sizes`` says; rows beyond their sum are left over."""

    sizes: Sequence[Count]

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        if not 0 < sum(self.sizes) <= len(labels):
            raise DataError(f"{self} asks for {sum(self.sizes)} rows, but there are {len(labels)}; lower its sizes")
        return deal(self, [rng.permutation(len(labels))], np.array([self.sizes]))
