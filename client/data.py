"""A participant's data: shards, tables, and readers for files, folders, arrays and functions.

Every reader returns a :class:`Table`: features and labels as a model takes them and, where the data names its clients,
one client id a row. Nothing is ever unpickled. In error messages rows count from 0.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from shoal.protos import registry
from shoal.protos.errors import DataError, nearest

__all__ = [
    "Shard",
    "Table",
    "as_table",
    "read_csv",
    "read_function",
    "read_image_folder",
    "read_npz",
    "read_parquet",
    "table",
]

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
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
        tests = [None if part is None else len(part) for part in (self.x_test, self.y_test)]
        if len(self.x) != len(self.y) or tests[0] != tests[1]:
            raise DataError(
                f"a shard has {len(self.x)} examples with {len(self.y)} labels and {tests[0]} held-out examples with "
                f"{tests[1]} labels; give each example one label"
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def held_out(self) -> Shard | None:
        """The held-out part as a shard of its own."""
        return None if self.x_test is None or self.y_test is None else Shard(self.x_test, self.y_test)


@final
@dataclass(frozen=True, eq=False)
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
        ids = len(self.x) if self.clients is None else len(self.clients)
        if not len(self.x) == len(self.y) == ids:
            raise DataError(f"x has {len(self.x)} rows, y {len(self.y)} and clients {ids}; give each row one of each")
        if len(self) == 0:
            raise DataError("x has no rows; a table needs at least one")

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


def read_npz(
    path: str | Path,
    x: str = "x",
    y: str = "y",
    clients: str | None = None,
    dtype: Literal["float32", "int64"] = "float32",
    class_names: Sequence[str] | None = None,
) -> Table:
    """The named arrays of an ``.npz`` file.

    uint8 arrays of three or more dimensions are images: scaled to float32 in [0, 1], ``[N, H, W]`` to ``[N, 1, H, W]``
    and ``[N, H, W, C]`` to ``[N, C, H, W]`` if only the last dimension is 1, 3 or 4. Otherwise as :func:`table`.
    """
    place = _existing(path)
    names = [x, y] if clients is None else [x, y, clients]
    try:
        # A file that is no archive makes np.load try to unpickle and say so; zipfile says what is the matter.
        with zipfile.ZipFile(place), np.load(place, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    raise DataError(f"{place} has no array {name!r}{nearest(name, archive.files)}")
            arrays = [archive[name] for name in names]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{place} cannot be read ({error}); write it with np.savez from plain arrays") from error
    return table(_pixels(arrays[0]), *arrays[1:], dtype=dtype, class_names=class_names, where=str(place))


def read_csv(
    path: str | Path,
    label: str,
    client: str | None = None,
    features: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Table:
    """A CSV file with a header: columns ``features`` (None: all others) to ``[N, F]``; see :func:`table`."""
    import pandas

    place = _existing(path)
    try:
        # As text from the start: ids "007" and "7" are two clients.
        frame = pandas.read_csv(place, dtype={client: str} if client else None, low_memory=False)
    except ValueError as error:
        raise DataError(f"{place} is no CSV file with a header: {error}") from error
    return _from_frame(frame, place, label, client, features, class_names)


def read_parquet(
    path: str | Path,
    label: str,
    client: str | None = None,
    features: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Table:
    """A Parquet file, as :func:`read_csv`; DataError if pyarrow is not installed."""
    place = _existing(path)
    _extra("pyarrow", "Parquet", "parquet")
    import pandas

    try:
        frame = pandas.read_parquet(place, engine="pyarrow")
    except ValueError as error:
        raise DataError(f"{place} is no Parquet file: {error}") from error
    return _from_frame(frame, place, label, client, features, class_names)


def read_image_folder(
    path: str | Path,
    size: int | None = None,
    grayscale: bool = False,
    clients: bool = False,
    class_names: Sequence[str] | None = None,
) -> Table:
    """Images in ``class/image.png`` (``client/class/image.png`` with ``clients``): float32 ``[N, C, H, W]`` in [0, 1].

    ``size`` resizes each to a square. Classes are folder names, numbered in the order of ``class_names``, else
    sorted. DataError if Pillow is not installed, a file is no image, or without ``size`` if sizes differ.
    """
    opener = _extra("PIL.Image", "images", "images")
    root = _existing(path, folder=True)
    found = sorted(root.glob("*/*/*" if clients else "*/*"))
    files = [file for file in found if file.suffix.lower() in IMAGES and not file.name.startswith(".")]
    if not files:
        layouts = (
            "client/class/image.png" if clients else "class/image.png, or client/class/image.png with clients=true"
        )
        raise DataError(f"no images in {root}; the layout is {layouts}")
    x = np.stack(_same_size([(file, _image(opener, file, size, grayscale)) for file in files]))
    names = [file.parent.name for file in files]
    ids = [file.parent.parent.name for file in files] if clients else None
    return table(_pixels(x), np.array(names), ids, class_names=class_names, where=str(root))


def read_function(spec: str, **arguments: Any) -> Table:
    """The result of ``"module:function"`` or ``"file.py:function"``: a Table, ``(x, y)`` or ``(x, y, clients)``."""
    return as_table(registry.build("shoal.datasets", spec, arguments, "data"), spec)


def _existing(path: str | Path, folder: bool = False) -> Path:
    place = Path(path).expanduser()
    if not (place.is_dir() if folder else place.is_file()):
        what = "folder" if folder else "file"
        raise DataError(f"no such {what} {str(path)!r} (looked in {Path.cwd()}); correct the path")
    return place


def _extra(module: str, what: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = {"PIL.Image": "Pillow"}.get(module, module)
        raise DataError(f"reading {what} needs {package}: pip install 'shoal[{extra}]'") from error


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
        return array.astype(np.float32), None
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


def _from_frame(
    frame: Any,
    place: Path,
    label: str,
    client: str | None,
    features: Sequence[str] | None,
    class_names: Sequence[str] | None,
) -> Table:
    columns = [str(name) for name in frame.columns]
    frame.columns = columns
    chosen = [name for name in columns if name not in (label, client)] if features is None else list(features)
    for name in [label, *([] if client is None else [client]), *chosen]:
        if name not in columns:
            raise DataError(f"{place} has no column {name!r}{nearest(name, columns)}")
    if not chosen:
        raise DataError(f"{place} has no feature columns beside {label!r}; name them in features")
    ids = None if client is None else frame[client]
    return table(frame[chosen], frame[label], ids, class_names=class_names, where=str(place))


def _pixels(array: np.ndarray) -> np.ndarray:
    """uint8 images to float32 ``[N, C, H, W]`` in [0, 1]; anything else as it is."""
    if array.dtype != np.uint8 or array.ndim < 3:
        return array
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        array = np.moveaxis(array, -1, 1)
    scaled = np.ascontiguousarray(array, dtype=np.float32)
    scaled /= 255
    return scaled


def _image(opener: Any, file: Path, size: int | None, grayscale: bool) -> np.ndarray:
    """One image as uint8 ``[C, H, W]``."""
    try:
        with opener.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would clip them to 255 without a word
                raise DataError(f"{file} has more than 8 bits a channel ({image.mode}); convert it to 8 bits first")
            pixels = image.convert("L" if grayscale else "RGB")
            array = np.array(pixels if size is None else pixels.resize((size, size)))
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image ({error}); replace or remove it") from error
    return array[None] if grayscale else np.moveaxis(array, -1, 0)


def _same_size(images: Sequence[tuple[Path, np.ndarray]]) -> list[np.ndarray]:
    shape = images[0][1].shape
    for file, image in images:
        if image.shape != shape:
            raise DataError(f"{file} is {image.shape[1:]}, but the first image is {shape[1:]}; set size to resize them")
    return [image for _, image in images]
