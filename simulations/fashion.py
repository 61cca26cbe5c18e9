"""Fashion-MNIST: the full set from its four files, and a subset that comes with Shoal.

Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747), MIT licence.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from shoal.client.data import Table, table
from shoal.client.readers import pixels, read_npz
from shoal.protos.errors import DataError

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
    """All 60,000 and 10,000 images, ``[N, 1, 28, 28]``, from the four ``.gz`` files in ``path``.

    Without ``path`` from ``$SHOAL_DATA/fashion-mnist``, ``~/.cache/shoal/fashion-mnist`` or
    ``/usr/share/datasets/fashion-mnist``. DataError if they are not there or are not the published ones.
    """
    folder = _folder(path)
    x, y, x_test, y_test = (_idx(folder / f"{name}.gz", digest) for name, digest in FASHION_MNIST.items())
    return table(pixels(x), y), table(pixels(x_test), y_test)


def _folder(path: str | Path | None) -> Path:
    shared = [Path.home() / ".cache/shoal/fashion-mnist", Path("/usr/share/datasets/fashion-mnist")]
    own = [Path(os.environ["SHOAL_DATA"]) / "fashion-mnist"] if os.environ.get("SHOAL_DATA") else []
    places = [*own, *shared] if path is None else [Path(path).expanduser()]
    for place in places:
        if all((place / f"{name}.gz").is_file() for name in FASHION_MNIST):
            return place
    files = ", ".join(f"{name}.gz" for name in FASHION_MNIST)
    raise DataError(
        f"Fashion-MNIST is not in {', '.join(map(str, places))}: put {files} "
        f"from https://github.com/zalandoresearch/fashion-mnist there, or apt-get install dataset-fashion-mnist, "
        f"or take 'fashion-mnist-subset'"
    )


def _idx(path: Path, digest: str) -> np.ndarray:
    """The array of an IDX file, of which the digest is known."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != digest:
        raise DataError(f"{path} is not the published file: its content has another MD5 than {digest}; fetch it again")
    dims = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
