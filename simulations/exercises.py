"""Human activity by subject: which of seven shoulder exercises somebody makes, from the smartwatch worn.

Burns et al. 2018 (arXiv 1802.01489): ten subjects, six axes at 50 Hz; they come with the Python package seglearn (BSD
licence).
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from shoal.client.data import Table, table
from shoal.simulations.found import content, find, in_package

__all__ = ["har"]

FILE, SHA256 = "watch_dataset.npy", "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


def har(path: str | Path | None = None, length: int = 100, step: int = 50) -> tuple[Table, Table]:
    """Windows of ``length`` samples, one every ``step``: float32 ``[N, 6, length]``, each axis standardised over all.

    Clients are the subjects 01 to 10. The last fifth of each recording is to test on, and no sample of it lies in a
    window to train on. ``watch_dataset.npy`` is looked for in ``path``, or in ``$SHOAL_DATA/har``,
    ``~/.cache/shoal/har`` or an installed seglearn. DataError if it is not there or is not the published file.
    """
    remedy = f"get it with 'pip install seglearn==1.2.5 --no-deps', or put its {FILE} there"
    folder = find("har", [FILE], path, [in_package("seglearn", "data")], remedy)
    recordings = _read(folder / FILE)
    names = [str(name) for name in recordings["y_labels"]]
    series = [np.asarray(one, np.float32) for one in recordings["X"]]
    every = np.concatenate(series)
    scaled = [(one - every.mean(0)) / every.std(0) for one in series]
    cuts = [len(one) * 4 // 5 for one in scaled]
    train = [_windows(one[:cut], length, step) for one, cut in zip(scaled, cuts, strict=True)]
    test = [_windows(one[cut:], length, step) for one, cut in zip(scaled, cuts, strict=True)]
    labels = [names[int(number)] for number in recordings["y"]]
    subjects = [f"{int(subject):02}" for subject in recordings["subject"]]
    return _table(train, labels, subjects, names), _table(test, labels, subjects, names)


def _read(path: Path) -> dict[str, Any]:
    """The pickled dictionary; only ever of the published bytes."""
    stored = io.BytesIO(content(path, SHA256))
    np.lib.format.read_magic(stored)
    np.lib.format.read_array_header_1_0(stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it names a module of numpy by what it was once called
        recordings: dict[str, Any] = pickle.load(stored, encoding="latin1").item()
    return recordings


def _windows(one: np.ndarray, length: int, step: int) -> np.ndarray:
    starts = np.arange(0, len(one) - length + 1, step)
    return np.moveaxis(one[starts[:, None] + np.arange(length)], 1, 2)


def _table(windows: list[np.ndarray], labels: list[str], subjects: list[str], names: list[str]) -> Table:
    counts = [len(part) for part in windows]
    return table(
        np.concatenate(windows),
        np.repeat(labels, counts),
        np.repeat(subjects, counts),
        class_names=names,
        where="the recordings",
    )
