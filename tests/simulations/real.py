"""Small files of the forms in which real data sets come, made up here, and their digests in place of the real ones."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shoal.simulations import census, exercises, fashion, mnist, schools

__all__ = ["idx", "real_data"]

PLAY = """# The Shoal

## ACT I

**PIKE**
{pike}
_Exit, with a splash_

### SCENE II. A brook

**TROUT**
{trout}

**PIKE**
And once more _[Aside]_ I say: {pike}
"""


def real_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for ``$SHOAL_DATA``, in which all data sets are found."""
    images(folder / "mnist", "MNIST", mnist, monkeypatch)
    images(folder / "fashion-mnist", "FASHION_MNIST", fashion, monkeypatch)
    (folder / "shakespeare").mkdir()
    words = {"pike": "I swim, I bite, I rest. " * 70, "trout": "Up the cold stream! " * 90}
    (folder / "shakespeare" / "the-shoal.md").write_text(PLAY.format(**words))
    recordings(folder / "har", monkeypatch)
    people(folder / "adult", monkeypatch)
    pupils(folder / "schools", monkeypatch)
    monkeypatch.setenv("SHOAL_DATA", str(folder))
    return folder


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def images(folder: Path, name: str, module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    digests = {}
    for file in vars(module)[name]:
        labels = np.arange(2000 if file.startswith("train") else 50, dtype=np.uint8) % 10
        array = labels if "labels" in file else np.zeros((len(labels), 28, 28), np.uint8) + 20 * labels[:, None, None]
        digests[file] = hashlib.md5(idx(array)).hexdigest()
        (folder / f"{file}.gz").write_bytes(gzip.compress(idx(array), 1))
    monkeypatch.setattr(module, name, digests)


def recordings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exercises of ten subjects, told apart by the mean of each axis, with their place in each recording."""
    folder.mkdir(parents=True)
    kinds, subjects = np.repeat([0, 1], 10), np.tile(np.arange(1, 11), 2)
    rng = np.random.default_rng(0)
    series = [rng.normal(kind, 0.1, (1000, 6)) for kind in kinds]
    for one in series:
        one[:, 5] = np.arange(1000)
    stored = {"X": series, "y": kinds, "subject": subjects, "side": kinds, "y_labels": ["PEN", "ROW"], "X_labels": []}
    np.save(folder / exercises.FILE, np.array(stored, dtype=object), allow_pickle=True)
    monkeypatch.setattr(exercises, "SHA256", hashlib.sha256((folder / exercises.FILE).read_bytes()).hexdigest())


def people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    row = "{}, {}, 7, HS-grad, {}, Divorced, {}, Wife, White, Female, {}, 0, 40, ?, {}"
    jobs = ["Sales", "Tech-support", "?", "Craft-repair", "Adm-clerical"]
    digests = {}
    for name, count, stop in (("adult.data", 200, ""), ("adult.test", 60, ".")):
        lines = [
            row.format(20 + n % 40, "Private", n % 16, jobs[n % 5], 99 * (n % 2), [">50K", "<=50K"][n % 2] + stop)
            for n in range(count)
        ]
        text = "\n".join([*(["|1x3 Cross validator"] if stop else []), *lines, "", ""])
        (folder / name).write_text(text)
        digests[name] = hashlib.md5(text.encode()).hexdigest()
    monkeypatch.setattr(census, "FILES", digests)


def pupils(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    n, rng = np.arange(400), np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "school": 1000 + n % 40,
            "minrty": np.where(n % 3, "No", "Yes"),
            "sx": np.where(n % 2, "Male", "Female"),
            "sector": np.where(n % 40 < 20, "Public", "Catholic"),
            "ses": rng.normal(size=400),
            "meanses": (n % 40) / 40,
        }
    )
    frame["mAch"] = 12 + 2 * frame["ses"]
    stored = lzma.compress(pickle.dumps(frame))
    (folder / schools.FILE).write_bytes(stored)
    monkeypatch.setattr(schools, "SHA256", hashlib.sha256(stored).hexdigest())
