import gzip
import hashlib
import runpy
from pathlib import Path

import numpy as np
import pytest

from shoal.protos.errors import DataError
from shoal.simulations import fashion
from shoal.simulations.datasets import load
from shoal.simulations.fashion import fashion_mnist
from shoal.simulations.label_skew import Dirichlet


@pytest.fixture
def small_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files of the official form with 700 images a class, and their digests in place of the official ones."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    digests = {}
    for name in fashion.FASHION_MNIST:
        labels = np.arange(7000 if name.startswith("train") else 1200, dtype=np.uint8) % 10
        array = labels if "labels" in name else np.zeros((len(labels), 2, 2), np.uint8) + labels[:, None, None]
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        content = header + array.tobytes()
        digests[name] = hashlib.md5(content).hexdigest()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    monkeypatch.setattr(fashion, "FASHION_MNIST", digests)
    monkeypatch.delenv("SHOAL_DATA", raising=False)
    return folder


def test_the_subset_is_balanced_and_ready_for_a_model() -> None:
    data = load("fashion-mnist-subset", partition=Dirichlet(20, alpha=0.5))

    assert data.train.x.shape == (6000, 1, 28, 28)
    assert data.train.x.dtype == np.float32
    assert (data.train.x.min(), data.train.x.max()) == (0, 1)
    assert np.bincount(data.train.y).tolist() == [600] * 10
    assert np.bincount(data.train.y[:50]).tolist() == [5] * 10
    assert data.test is not None
    assert data.test.x.shape == (1000, 1, 28, 28)
    assert np.bincount(data.test.y).tolist() == [100] * 10
    assert data.spec == {
        "name": "fashion-mnist-subset",
        "partition": {"kind": "dirichlet", "clients": 20, "alpha": 0.5, "min_examples": 1},
    }
    split = data.split(0)
    assert (len(split.clients), split.shape, split.classes) == (20, (1, 28, 28), 10)


def test_fashion_mnist_is_found_in_the_usual_places(small_fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DATA", str(small_fashion.parent))

    for train, test in (fashion_mnist(), fashion_mnist(small_fashion)):
        assert train.x.shape == (7000, 1, 2, 2)
        assert train.x[9, 0, 0, 0] == np.float32(9 / 255)
        assert test.y[:3].tolist() == [0, 1, 2]


def test_fashion_mnist_errors(small_fashion: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"'fashion-mnist' is not in nowhere: put train-.*apt-get install.*-subset'",
    ):
        fashion_mnist("nowhere")
    file = small_fashion / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(b"other"))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is not the published file: .*; fetch it again"):
        fashion_mnist(small_fashion)
    file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is damaged .*; fetch it again"):
        fashion_mnist(small_fashion)


def test_the_script_draws_a_balanced_subset(small_fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[str, np.ndarray] = {}
    monkeypatch.setattr(np, "savez_compressed", lambda path, **arrays: saved.update(arrays))
    script = Path(fashion.__file__).parent / "data" / "make_fashion_mnist_subset.py"

    runpy.run_path(str(script))["main"](str(small_fashion))
    assert {name: (array.shape, array.dtype.name) for name, array in saved.items()} == {
        "x": ((6000, 2, 2), "uint8"),
        "y": ((6000,), "uint8"),
        "x_test": ((1000, 2, 2), "uint8"),
        "y_test": ((1000,), "uint8"),
    }
    assert (saved["x"][:, 0, 0] == saved["y"]).all()
    assert np.bincount(saved["y_test"][:20]).tolist() == [2] * 10


def test_public_names_are_sorted() -> None:
    assert fashion.__all__ == sorted(fashion.__all__)
    assert all(hasattr(fashion, name) for name in fashion.__all__)
