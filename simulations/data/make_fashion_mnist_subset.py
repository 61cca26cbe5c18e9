"""Make fashion_mnist_subset.npz from the four official files of Fashion-MNIST.

    python make_fashion_mnist_subset.py FOLDER

FOLDER holds train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files. Of each class 600 images of
the training set and 100 of the test set are drawn. Classes take turns (0, 1, …, 9, 0, …), so that any first rows are
balanced too. Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747), MIT licence.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from shoal.client.data import Table
from shoal.simulations.fashion import fashion_mnist

SEED = 0


def draw(labels: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
    """``each`` rows of every class, in turns."""
    rows = [np.sort(rng.choice(np.flatnonzero(labels == label), each, replace=False)) for label in np.unique(labels)]
    return np.stack(rows, axis=1).ravel()


def pick(table: Table, each: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[N, H, W]`` and labels as bytes."""
    chosen = table.take(draw(table.y, each, rng))
    return np.rint(chosen.x[:, 0] * 255).astype(np.uint8), chosen.y.astype(np.uint8)


def main(folder: str) -> None:
    rng = np.random.default_rng(SEED)
    train, test = fashion_mnist(folder)
    x, y = pick(train, 600, rng)
    x_test, y_test = pick(test, 100, rng)
    target = Path(__file__).with_name("fashion_mnist_subset.npz")
    np.savez_compressed(target, x=x, y=y, x_test=x_test, y_test=y_test)


if __name__ == "__main__":
    main(*sys.argv[1:])
