"""A participant's data: shards, and tables of rows that become them.

In error messages rows count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from shoal.protos.errors import DataError, nearest

__all__ = ["Shard", "Table", "as_table", "table"]

DTYPES = ("float32", "int64")


@final
@dataclass(frozen=True, eq=False)
class Shard:
    """One client's examples ``x`` ``[n, ...]`` and ``y`` ``[n, ...]``, and those it holds out to test on, if any.

    DataError if examples and labels differ in number.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor | None = None
    y_test: Tensor | None = None

    def __post_init__(self) -> None:
        # shape[0] and not len(), which costs four times as much: shards are made for every client and round
        x, y, x_test, y_test = (None if p is None else p.shape[0] for p in (self.x, self.y, self.x_test, self.y_test))
        if x != y or x_test != y_test:
            raise DataError(
                f"a shard has {x} examples with {y} labels and {x_test} held-out examples with {y_test} labels; give "
                f"each example one label"
            )

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def held_out(self) -> Shard | None:
        """The held-out part as a shard of its own."""
        return None if self.x_test is None or self.y_test is None else Shard(self.x_test, self.y_test)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Rows as arrays: ``x`` ``[n, ...]`` and ``y`` ``[n, ...]`` (float32 or int64), ``clients`` ``[n]`` ids (text).

    ``class_names`` says what the labels 0, 1, … were called where they came as text. :func:`table` builds one from
    other types. DataError for no rows, other dtypes or unequal lengths.
    """

    x: np.ndarray
    y: np.ndarray
    clients: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, array in (("x", self.x), ("y", self.y)):
            if array.dtype.name not in DTYPES:
                raise DataError(
                    f"{name} is of dtype {array.dtype}, not {' or '.join(DTYPES)}; build it with table(x, y)"
                )
        if self.clients is not None and self.clients.dtype.kind != "U":
            raise DataError(f"clients is of dtype {self.clients.dtype}, not text; build it with table(x, y, clients)")
        if self.clients is not None and self.clients.ndim != 1:
            raise DataError(f"clients has shape {list(self.clients.shape)}; give each row one id")
        ids = len(self.x) if self.clients is None else len(self.clients)
        if not len(self.x) == len(self.y) == ids:
            raise DataError(f"x has {len(self.x)} rows, y {len(self.y)} and clients {ids}; give each row one of each")
        if len(self) == 0:
            raise DataError("x has no rows; a table needs at least one")

    def __repr__(self) -> str:
        clients = "" if self.clients is None else f", {len(np.unique(self.clients))} clients"
        return f"<Table {len(self)} rows, x {self.x.dtype}{list(self.x.shape[1:])}, y {self.y.dtype}{clients}>"

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: np.ndarray) -> Table:
        """The table of these rows."""
        clients = None if self.clients is None else self.clients[rows]
        return Table(self.x[rows], self.y[rows], clients, self.class_names)


def table(
    x: Any,
    y: Any,
    clients: Any = None,
    *,
    dtype: Literal["float32", "int64"] = "float32",
    class_names: Sequence[str] | None = None,
    where: str = "the data",
) -> Table:
    """A table from numpy, torch, lists or pandas.

    Features become ``dtype`` (int64 for token ids), their values unchanged. Integer labels become int64, floats stay
    float32, text becomes class indices: in the order of ``class_names``, else sorted. Devices that read their own files
    must all be given the same ``class_names``, since one that lacks a class would count differently.
    DataError for text or missing values in ``x``, missing labels or ids; ``where`` names the source in it.
    """
    features = _features(x, dtype, where)
    labels, names = _labels(y, class_names, where)
    ids = None if clients is None else _present(clients, "client id", where).astype(np.str_)
    try:
        return Table(features, labels, ids, names)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def as_table(result: Any, where: str) -> Table:
    """What a data function returned, as a table: a Table, ``(x, y)`` or ``(x, y, clients)``; else DataError."""
    if isinstance(result, Table):
        return result
    if isinstance(result, tuple) and len(result) in (2, 3):
        return table(*result, where=where)
    raise DataError(f"{where} returned {type(result).__name__}; it must return a Table, (x, y) or (x, y, clients)")


def _array(values: Any, where: str) -> np.ndarray:
    if isinstance(values, Tensor):
        plain = values.detach().cpu()
        return np.asarray((plain.float() if plain.dtype is torch.bfloat16 else plain).numpy())
    try:
        return np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
    except ValueError as error:
        raise DataError(f"{where} is ragged ({error}); pad or resize the examples to one shape") from error


def _present(values: Any, what: str, where: str) -> np.ndarray:
    """As an array without missing values; the types of an object array are found again."""
    array = _array(values, where)
    if array.dtype.kind == "O":
        missing = np.array([value is None or value != value for value in array.ravel()], bool).reshape(array.shape)
    else:
        missing = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    if missing.any():
        column = f" in column {values.name!r}" if getattr(values, "name", None) is not None else ""
        raise DataError(f"{where}: row {np.argwhere(missing)[0][0]} has no {what}{column}; drop or fill such rows")
    return np.array(array.tolist()) if array.dtype.kind in "OT" else array


def _labels(values: Any, names: Sequence[str] | None, where: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    array = _present(values, "label", where)
    if array.dtype.kind == "f" and names is None:
        with np.errstate(over="ignore"):  # what overflows is reported below, with its place
            numbers = array.astype(np.float32)
        if not np.isfinite(numbers).all():
            row = np.argwhere(~np.isfinite(numbers))[0][0]
            raise DataError(f"{where}: the label of row {row} is inf as float32; drop such rows, or scale the labels")
        return numbers, None
    if array.dtype.kind in "iub" and names is None:
        return array.astype(np.int64), None
    if array.dtype.kind not in "Uiub":
        raise DataError(f"{where}: labels of dtype {array.dtype} are no classes; give integers, floats or text")
    found, inverse = np.unique(array.astype(np.str_), return_inverse=True)
    classes = tuple(found.tolist()) if names is None else tuple(names)
    for name in found.tolist():
        if name not in classes:
            raise DataError(f"{where}: label {name!r} is not in class_names{nearest(name, classes)}")
    index = np.array([classes.index(name) for name in found.tolist()], dtype=np.int64)
    return index[inverse].reshape(array.shape), classes


def _features(values: Any, dtype: str, where: str) -> np.ndarray:
    columns = [str(name) for name in values.columns] if hasattr(values, "columns") else None
    if columns is not None:
        _check_columns(values, columns, where)
        values = values.to_numpy(dtype="float64")  # mixed columns would come as objects
    array = _array(values, where)
    whole = dtype == "float32" or array.dtype.kind != "f" or bool((array == np.rint(array)).all())
    if array.dtype.kind not in "fiub" or not whole:
        raise DataError(f"{where}: features of dtype {array.dtype} cannot become {dtype}; encode them as numbers first")
    with np.errstate(over="ignore"):  # what overflows is reported below, with its place
        array = np.ascontiguousarray(array, dtype=dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, *rest = (int(i) for i in np.argwhere(~np.isfinite(array))[0])
        column = f", column {columns[rest[0]]!r}" if columns else f", column {rest[0]}" if rest else ""
        value = array[(row, *rest)]
        raise DataError(f"{where}: row {row}{column} is {value}; drop or fill such rows, or scale the column")
    return array


def _check_columns(frame: Any, columns: Sequence[str], where: str) -> None:
    from pandas.api.types import is_numeric_dtype

    for name, (_, series) in zip(columns, frame.items(), strict=True):
        if not is_numeric_dtype(series.dtype):
            raise DataError(
                f"{where}: column {name!r} is {series.dtype}, not numbers; encode it, or leave it out of features"
            )
        if series.isna().any():
            row = int(series.isna().to_numpy().argmax())
            raise DataError(f"{where}: row {row}, column {name!r} is missing; drop or fill such rows")
