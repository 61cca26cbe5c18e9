"""Partitioners by label: clients whose mixes of classes differ.

Three splits are called "Dirichlet" in papers; :class:`Dirichlet`, :class:`DirichletMix` and :class:`InnerDirichlet` say
which is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, final

import numpy as np
from annotated_types import Ge, Le

from shoal.protos.errors import DataError
from shoal.simulations.dealing import apportion, check_enough, classes_of, deal, named, rows_by_class, take, until
from shoal.simulations.interleaving import interleave
from shoal.simulations.partitioners import Alpha, Count, Partitioner, Split

__all__ = [
    "Continuous",
    "Dirichlet",
    "DirichletMix",
    "Distribution",
    "InnerDirichlet",
    "Pathological",
    "PowerLaw",
    "Shards",
    "Similarity",
]

Share = Annotated[float, Ge(0), Le(1)]


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
        check_enough(self, self.clients, len(labels), self.min_examples)
        per_class = np.bincount(classes_of(self, labels))

        def draw() -> np.ndarray:
            shares = rng.dirichlet(np.full(self.clients, self.alpha), size=len(per_class))
            return apportion(per_class, shares)

        counts = until(self, draw, self.min_examples, len(labels))
        return deal(self, rows_by_class(labels, rng), counts)


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
        check_enough(self, self.clients, len(labels))
        left = np.bincount(classes_of(self, labels))
        mixes = rng.dirichlet(self.alpha * left / left.sum(), size=self.clients)
        counts = np.empty((len(left), self.clients), dtype=np.int64)
        for client, mix in enumerate(mixes):
            counts[:, client] = take(left, mix, len(labels) // self.clients, rng)
            left = left - counts[:, client]
        return deal(self, rows_by_class(labels, rng), counts)


@final
@dataclass(frozen=True)
class InnerDirichlet(Partitioner):
    """For each client, its mix of classes ~ Dir(α, …, α), whatever the whole's; sizes are equal or log-normal.

    FedDyn (Acar et al. 2021, ICLR) and flwr-datasets: clients in random order draw row by row, so that all of them
    meet the scarcity of the last rows. ``sigma`` is the standard deviation of the sizes' logarithms, 0 for equal ones
    (± 1). Ten classes: α = 0.1 here is α = 1 of :class:`DirichletMix`.
    """

    clients: Count
    alpha: Alpha
    sigma: Annotated[float, Ge(0)] = 0.0

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        check_enough(self, self.clients, len(labels))
        per_class = np.bincount(classes_of(self, labels))
        weights = rng.lognormal(0, self.sigma, self.clients)
        sizes = apportion(np.array([len(labels)]), weights[None] / weights.sum())[0]
        mixes = rng.dirichlet(np.full(len(per_class), self.alpha), size=self.clients)
        return deal(self, rows_by_class(labels, rng), interleave(per_class, sizes, mixes, rng).T)


@final
@dataclass(frozen=True)
class Pathological(Partitioner):
    """Each client knows ``classes_per_client`` classes; those who know a class share its rows equally (± 1).

    ``assignment`` says which. ``"first"``: client i knows class i mod C and others at random, the #C = k of NIID-Bench
    (Li et al. 2022); ``"random"``: all at random; ``"cyclic"``: i, i + 1, … mod C. The names in flwr-datasets are
    first-deterministic, random, deterministic. Rows of a class that nobody knows are left over.
    """

    clients: Count
    classes_per_client: Count = 2
    assignment: Literal["first", "random", "cyclic"] = "first"

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        check_enough(self, self.clients, len(labels))
        per_class = np.bincount(classes_of(self, labels))
        if self.classes_per_client > len(per_class):
            raise DataError(f"{self}: there are only {len(per_class)} classes; lower data.partition.classes_per_client")
        known = np.zeros((len(per_class), self.clients))
        for client in range(self.clients):
            known[self._classes(client, len(per_class), rng), client] = 1
        counts = apportion(per_class, known / np.maximum(known.sum(1, keepdims=True), 1))
        if (counts[known == 1] == 0).any():
            raise DataError(f"{self}: a class has fewer rows than clients who know it; lower data.partition.clients")
        return deal(self, rows_by_class(labels, rng), counts)

    def _classes(self, client: int, count: int, rng: np.random.Generator) -> np.ndarray:
        if self.assignment == "cyclic":
            return (client + np.arange(self.classes_per_client)) % count
        mixed = rng.permutation(count)
        if self.assignment == "first":
            mixed = np.concatenate([[client % count], mixed[mixed != client % count]])
        return mixed[: self.classes_per_client]


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
        classes_of(self, labels)
        check_enough(self, self.clients, len(labels), self.shards_per_client)
        pieces = np.array_split(np.concatenate(rows_by_class(labels, rng)), count)
        dealt = rng.permutation(count).reshape(self.clients, -1)
        return named([np.concatenate([pieces[i] for i in mine]) for mine in dealt])


@final
@dataclass(frozen=True)
class Similarity(Partitioner):
    """A share ``similarity`` of the rows at random, the others sorted by label and cut into equal pieces.

    SCAFFOLD (Karimireddy et al. 2020, ICML), section 7: 0 is all by label, 1 is IID. Sizes are equal (± 2).
    """

    clients: Count
    similarity: Share

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        check_enough(self, self.clients, len(labels))
        classes = classes_of(self, labels)
        rows = rng.permutation(len(labels))
        mixed, rest = np.split(rows, [round(self.similarity * len(rows))])
        by_label = rest[np.argsort(classes[rest], kind="stable")]
        # Where neither divides, the pieces that are longer by one fall on different clients.
        pieces = zip(np.array_split(mixed, self.clients), np.array_split(by_label, self.clients)[::-1], strict=True)
        return named([np.concatenate(pair) for pair in pieces])


@final
@dataclass(frozen=True)
class Distribution(Partitioner):
    """``shares[i][c]`` of the rows of class c go to client i: any split that can be written down.

    Classes in sorted order. What the shares of a class leave of 1 is left over; each count is within 1 of its share.
    """

    shares: Sequence[Sequence[Share]]

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        per_class = np.bincount(classes_of(self, labels))
        widths = {len(line) for line in self.shares}
        if widths != {len(per_class)}:
            raise DataError(f"data.partition.shares has lines of {sorted(widths)} numbers for {len(per_class)} classes")
        shares = np.array(self.shares, np.float64).T
        if shares.sum(1).max() > 1 + 1e-9:
            worst = int(shares.sum(1).argmax())
            raise DataError(
                f"data.partition.shares gives {shares[worst].sum():g} of class {worst}; it may give 1 at most"
            )
        return deal(self, rows_by_class(labels, rng), apportion(per_class, shares))


@final
@dataclass(frozen=True)
class PowerLaw(Partitioner):
    """Few classes a client and sizes over orders of magnitude: the MNIST split of FedProx (Li et al. 2020, MLSys).

    Client i knows ``classes_per_client`` classes from i mod C on. Of each it has ``least`` rows, and of the others a
    share ∝ a log-normal number, whose logarithm has standard deviation ``sigma``. Every row is dealt out.
    """

    clients: Count
    classes_per_client: Count = 2
    sigma: Annotated[float, Ge(0)] = 2.0
    least: Annotated[int, Ge(0)] = 5

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        per_class = np.bincount(classes_of(self, labels))
        known = np.zeros((len(per_class), self.clients))
        for slot in range(min(self.classes_per_client, len(per_class))):
            known[(np.arange(self.clients) + slot) % len(per_class), np.arange(self.clients)] = 1
        spare = per_class - self.least * known.sum(1).astype(np.int64)
        if spare.min() < 0 or not known.sum(1).all():
            raise DataError(
                f"{self} does not fit {per_class.min()} to {per_class.max()} rows of {len(per_class)} classes: each "
                f"needs clients who know it, with {self.least} rows for each; change data.partition.clients"
            )
        weights = known * rng.lognormal(0, self.sigma, known.shape)
        counts = self.least * known.astype(np.int64) + apportion(spare, weights / weights.sum(1, keepdims=True))
        return deal(self, rows_by_class(labels, rng), counts)


@final
@dataclass(frozen=True)
class Continuous(Partitioner):
    """Rows sorted by a number, blurred, and cut into equal shards: the label skew of regression.

    flwr-datasets: b = ``strictness`` · z + (1 - ``strictness``) · ε, where z is the standardised label and ε ~ N(0, 1).
    0 is IID, 1 gives each client a range of its own. Sizes are equal (± 1).
    """

    clients: Count
    strictness: Share = 0.5

    def split(self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator) -> Split:
        check_enough(self, self.clients, len(labels))
        if labels.ndim != 1 or labels.dtype.kind not in "iuf" or not labels.std() > 0:
            raise DataError(f"{self} sorts by label, but the labels are {labels.dtype}{list(labels.shape)}, or all one")
        z = (labels - labels.mean()) / labels.std()
        blurred = self.strictness * z + (1 - self.strictness) * rng.standard_normal(len(labels))
        return named(np.array_split(np.argsort(blurred, kind="stable"), self.clients))
