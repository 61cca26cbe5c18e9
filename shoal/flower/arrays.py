"""Flower's arrays, faster: the same values and the same bytes, with fewer copies of them.

An ``Array`` holds the bytes of a ``.npy`` file. flwr writes and reads them through file objects, three copies each, and
reads the header with Python's own parser each time. Here a header is worked out once for each dtype and shape.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copyreg import dispatch_table
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array

__all__ = ["Packed", "pack", "quick_arrays", "unpack", "view"]

MAGIC = b"\x93NUMPY\x01\x00"  # of version 1.0, which NumPy takes unless a header is very long
NUMPY = "numpy.ndarray"
Packed = tuple[bytes, list[Any]]  # a pickle, and the bytes that it has left outside
_numpy, _from_numpy = (Array.__dict__[name] for name in ("numpy", "from_numpy_ndarray"))


@lru_cache(1024)
def _layout(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """None where NumPy must decide."""
    file = BytesIO(header)
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None
    return None if fortran or dtype.kind not in "biufc" else (dtype, shape)


@lru_cache(1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def view(array: Array) -> np.ndarray | None:
    """The array over its own bytes, not to be written to; None if :meth:`Array.numpy` must read them."""
    data = array.data
    if array.stype != NUMPY or data[:8] != MAGIC:
        return None
    start = 10 + int.from_bytes(data[8:10], "little")
    layout = _layout(data[:start])
    if layout is None or len(data) != start + layout[0].itemsize * int(np.prod(layout[1], dtype=np.int64)):
        return None
    return np.frombuffer(data, layout[0], offset=start).reshape(layout[1])


def _read(array: Array) -> np.ndarray:
    found = view(array)
    return _numpy(array) if found is None else found.copy()


def _write(cls: type[Array], ndarray: np.ndarray) -> Array:
    plain = type(ndarray) is np.ndarray and ndarray.dtype.kind in "biufc" and ndarray.flags.c_contiguous
    if not plain:
        return _from_numpy.__get__(None, cls)(ndarray)  # type: ignore[no-any-return]
    data = b"".join((_header(ndarray.dtype.str, ndarray.shape), ndarray.reshape(-1).view(np.uint8).data))
    return Array(str(ndarray.dtype), tuple(ndarray.shape), NUMPY, data)


@contextmanager
def quick_arrays() -> Iterator[None]:
    """Let all ``Array`` of this process read and write in this way."""
    patched: Any = Array
    patched.numpy, patched.from_numpy_ndarray = _read, classmethod(_write)
    try:
        yield
    finally:
        patched.numpy, patched.from_numpy_ndarray = _numpy, _from_numpy


# --- from process to process -----------------------------------------------------------------------------------------


def _made(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    return Array(dtype, shape, stype, data if type(data) is bytes else bytes(data))


def _reduce(array: Array) -> tuple[Any, ...]:
    return _made, (array.dtype, array.shape, array.stype, pickle.PickleBuffer(array.data))


class _Pickler(pickle.Pickler):
    """Leaves the bytes of arrays outside."""

    dispatch_table = {**dispatch_table, Array: _reduce}  # noqa: RUF012  (pickle reads it from the class)


def pack(thing: object) -> Packed:
    """``thing`` pickled without the bytes of its arrays, and these bytes, not copied."""
    file, buffers = BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return file.getvalue(), [memoryview(buffer).obj for buffer in buffers]


def unpack(pickled: Any, buffers: Sequence[Any]) -> Any:
    """The inverse of :func:`pack`, of processes of our own; what is no ``bytes`` among ``buffers`` is copied."""
    return pickle.loads(pickled, buffers=buffers)
