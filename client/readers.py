"""Readers: files, folders, arrays and functions as tables.

Every reader returns a :class:`~shoal.client.data.Table`: features and labels as a model takes them and, where the data
names its clients, one client id a row. Nothing is ever unpickled.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shoal.client.data import Table, as_table, table
from shoal.protos import registry
from shoal.protos.errors import DataError, nearest

__all__ = ["pixels", "read_csv", "read_function", "read_image_folder", "read_npz", "read_parquet"]

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


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
    return table(pixels(arrays[0]), *arrays[1:], dtype=dtype, class_names=class_names, where=str(place))


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
    _needed("pyarrow", "reading Parquet needs pyarrow: pip install 'shoal[parquet]'")
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
    opener = _needed("PIL.Image", "reading images needs Pillow: pip install 'shoal[images]'")
    root = _existing(path, folder=True)
    found = sorted(root.glob("*/*/*" if clients else "*/*"))
    files = [file for file in found if file.suffix.lower() in IMAGES and not file.name.startswith(".")]
    if not files:
        layout = "client/class/image.png"
        layout = layout if clients else f"class/image.png, or {layout} with clients=true"
        raise DataError(f"no images in {root}; the layout is {layout}")
    x = np.stack(_same_size([(file, _image(opener, file, size, grayscale)) for file in files]))
    names = [file.parent.name for file in files]
    ids = [file.parent.parent.name for file in files] if clients else None
    return table(pixels(x), np.array(names), ids, class_names=class_names, where=str(root))


def read_function(spec: str, **arguments: Any) -> Table:
    """The result of ``"module:function"`` or ``"file.py:function"``: a Table, ``(x, y)`` or ``(x, y, clients)``."""
    return as_table(registry.build("shoal.datasets", spec, arguments, "data"), spec)


def pixels(array: np.ndarray) -> np.ndarray:
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


def _existing(path: str | Path, folder: bool = False) -> Path:
    place = Path(path).expanduser()
    if not (place.is_dir() if folder else place.is_file()):
        what = "folder" if folder else "file"
        raise DataError(f"no such {what} {str(path)!r} (looked in {Path.cwd()}); correct the path")
    return place


def _needed(module: str, message: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(message) from error


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


def _image(opener: Any, file: Path, size: int | None, grayscale: bool) -> np.ndarray:
    """One image as uint8 ``[C, H, W]``."""
    try:
        with opener.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would clip them to 255 without a word
                raise DataError(f"{file} has more than 8 bits a channel ({image.mode}); convert it to 8 bits first")
            converted = image.convert("L" if grayscale else "RGB")
            array = np.array(converted if size is None else converted.resize((size, size)))
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image ({error}); replace or remove it") from error
    return array[None] if grayscale else np.moveaxis(array, -1, 0)


def _same_size(images: Sequence[tuple[Path, np.ndarray]]) -> list[np.ndarray]:
    shape = images[0][1].shape
    for file, image in images:
        if image.shape != shape:
            raise DataError(f"{file} is {image.shape[1:]}, but the first image is {shape[1:]}; set size to resize them")
    return [image for _, image in images]
