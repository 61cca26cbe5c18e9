"""Fashion-MNIST: the full set from its four files, and a subset that comes with Shoal.

Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747), MIT licence.
"""

from __future__ import annotations

from pathlib import Path

from shoal.client.data import Table, table
from shoal.client.readers import pixels, read_npz
from shoal.simulations.found import find, read_idx

__all__ = ["fashion_mnist", "fashion_mnist_subset"]

# MD5 of the unpacked files: the same whoever packed them.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def fashion_mnist_subset() -> tuple[Table, Table]:
    """6,000 images to train on and 1,000 to test on, ``[N, 1, 28, 28]``: a balanced subset that comes with Shoal."""
    path = Path(__file__).parent / "data" / "fashion_mnist_subset.npz"
    return read_npz(path), read_npz(path, "x_test", "y_test")


def fashion_mnist(path: str | Path | None = None) -> tuple[Table, Table]:
    """All 60,000 and 10,000 images, ``[N, 1, 28, 28]``, from the four files in ``path``, packed with gzip or not.

    Without ``path`` from ``$SHOAL_DATA/fashion-mnist``, ``~/.cache/shoal/fashion-mnist`` or
    ``/usr/share/datasets/fashion-mnist``. DataError if they are not there or are not the published ones.
    """
    remedy = (
        f"put {', '.join(f'{name}.gz' for name in FASHION_MNIST)} from "
        f"https://github.com/zalandoresearch/fashion-mnist there, or apt-get install dataset-fashion-mnist, or take "
        f"'fashion-mnist-subset'"
    )
    folder = find("fashion-mnist", FASHION_MNIST, path, [Path("/usr/share/datasets/fashion-mnist")], remedy)
    x, y, x_test, y_test = (read_idx(folder / name, digest) for name, digest in FASHION_MNIST.items())
    return table(pixels(x), y), table(pixels(x_test), y_test)
