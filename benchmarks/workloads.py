"""The workloads: what is trained, on whose examples, for how long.

Images are random, labelled by a random linear function; texts are random walks. No dropout in ``pfl-cnn``: kernels
draw masks in the order of memory, so other layouts and other frameworks drop other units and end elsewhere, and then
nobody could tell a wrong answer from an unlucky one. ``pfl-cnn-dropout`` has it, as pfl's own benchmark does, and is
not compared; it runs where ``--only`` names it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.nets import NETS, VOCABULARY, weights_of
from benchmarks.tasks import SEED, Task, write
from shoal.client.net import build_module
from shoal.protos.seeds import stream
from shoal.simulations.federated import Numbered
from shoal.strategies.selectors import Uniform

__all__ = ["DEFAULT", "WORKLOADS", "Workload", "prepared"]

CLASSES = 10
SKEW = (5, 500)  # the fewest and the most examples of a client whose size is drawn


@dataclass(frozen=True)
class Workload:
    """``rounds`` are so many that one repetition takes 20 seconds at most; slow contenders do only the first ``short``.

    ``shards`` hold ``examples`` each (the median, where sizes are ``skewed``); of the ``registered`` clients, those
    beyond the shards hold what client ``number % shards`` holds. ``compared``: all must end at the same weights, up to
    ``tolerance`` of the way that they went: rounding alone is far below, but where it turns a ReLU, or another of four
    numbers is the largest, training goes on from elsewhere. Contenders ``without`` which it is run would take minutes.
    """

    title: str
    net: str
    shape: tuple[int, ...]
    shards: int
    examples: int
    cohort: int
    rounds: int
    lr: float = 0.05
    batch: int = 10
    skewed: bool = False
    texts: bool = False
    registered: int | None = None
    compared: bool = True
    tolerance: float = 1e-4
    short: int = 10
    without: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        return self.registered or self.shards

    def sizes(self) -> np.ndarray:
        if not self.skewed:
            return np.full(self.shards, self.examples)
        drawn = stream(SEED, "benchmark sizes").lognormal(np.log(self.examples), 1.0, self.shards)
        return np.clip(np.rint(drawn), *SKEW).astype(np.int64)

    def cohorts(self) -> np.ndarray:
        """As Shoal draws them."""
        everyone = Numbered(self.clients)
        rounds = range(1, self.rounds + 1)
        asked = [Uniform().select({}, everyone, self.cohort, r, stream(SEED, "cohort", r)) for r in rounds]
        return np.array(asked).astype(np.int64)

    def orders(self, cohorts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """As Shoal draws them: a client whose shard is one batch is given it as it lies."""
        orders = list[np.ndarray]()
        for round, cohort in enumerate(cohorts, start=1):
            for client in cohort:
                size, drawn = sizes[client % self.shards], stream(SEED, "batches", round, str(client))
                orders.append(np.arange(size) if size <= self.batch else drawn.permutation(size))
        return np.concatenate(orders).astype(np.int64)

    def data(self, count: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        if self.texts:
            return _texts(count, self.shape[0], generator)
        x = torch.randn(count, *self.shape, generator=generator)
        y = (x.flatten(1) @ torch.randn(x[0].numel(), CLASSES, generator=generator)).argmax(dim=1)
        return x, y


def _texts(count: int, places: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each character is the one before it plus 0, 1 or 2: there is something to learn."""
    steps = torch.randint(3, (count, places + 1), generator=generator)
    steps[:, 0] = torch.randint(VOCABULARY, (count,), generator=generator)
    text = steps.cumsum(dim=1) % VOCABULARY
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


TINY = Workload("LR 784→10, 1,000 clients × 60", "logistic", (784,), shards=1000, examples=60, cohort=100, rounds=100)
NN: Any = {"net": "2nn", "lr": 0.02, "tolerance": 0.02}
IMAGES: Any = {"shape": (3, 32, 32), "examples": 50, "cohort": 50}
LENET: Any = {**IMAGES, "rounds": 20, "short": 8, "lr": 0.02, "tolerance": 0.02}
STACKED = ("shoal-captured-*", "shoal-fused-*")
CNN = Workload(
    "pfl's CNN on 3×32×32, 1,000 clients × 50",
    "pfl-cnn",
    shards=1000,
    rounds=5,
    tolerance=0.05,
    without=STACKED,
    **IMAGES,
)
TEXTS: Any = {"shape": (40,), "shards": 100, "examples": 40, "cohort": 20, "rounds": 10, "lr": 0.1, "texts": True}
# Of so many clients flwr looks at each one, which takes it about a minute a round.
MANY = replace(
    TINY, title="LR 784→10, 1,000,000 registered clients", registered=1_000_000, rounds=40, short=3, without=("flwr",)
)
WORKLOADS: Mapping[str, Workload] = {
    "lr-tiny": TINY,
    "2nn": replace(TINY, title="2NN, 1,000 clients × 60", rounds=30, **NN),
    "lenet": Workload("LeNet on 3×32×32, 500 clients × 50", "lenet", shards=500, **LENET),
    "pfl-cnn": CNN,
    "skewed": replace(TINY, title="2NN, 1,000 clients × 5 to 500", skewed=True, rounds=10, **NN),
    "gru": Workload("character GRU 128, 100 clients × 40 texts", "gru", tolerance=2e-4, **TEXTS),
    "transformer": Workload("two-layer transformer 64, 100 × 40 texts", "transformer", tolerance=2e-3, **TEXTS),
    "registered-1k": replace(TINY, title="LR 784→10, 1,000 registered clients", registered=1000, rounds=40),
    "registered-1m": MANY,
    "pfl-cnn-dropout": replace(CNN, title=f"{CNN.title}, with dropout", net="pfl-cnn-dropout", compared=False),
    "test": replace(TINY, title="LR 784→10, 24 clients × 25", shards=24, examples=25, cohort=8, rounds=3),
}
DEFAULT = tuple(name for name in WORKLOADS if name not in ("pfl-cnn-dropout", "test"))


@contextmanager
def prepared(work: Workload) -> Iterator[Task]:
    """The workload as files in a folder of its own, which is removed with the block."""
    sizes, cohorts = work.sizes(), work.cohorts()
    x, y = work.data(int(sizes.sum()))
    arrays = {
        "x": x.numpy(),
        "y": y.numpy(),
        "starts": np.concatenate([[0], np.cumsum(sizes)]),
        "cohorts": cohorts,
        "orders": work.orders(cohorts, sizes),
        "initial": weights_of(build_module(NETS[work.net], SEED, "float32")),
    }
    said = {"net": work.net, "lr": work.lr, "batch": work.batch, "rounds": work.rounds}
    said |= {"registered": work.clients, "lazy": work.registered is not None}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        yield write(Path(folder), said, arrays, work.short)
