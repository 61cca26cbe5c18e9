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
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

__all__ = ["FIELDS", "NEW", "Lent", "Packed", "bytes_of", "lent", "lent_in", "pack", "quick_arrays", "unpack", "view"]

MAGIC = b"\x93NUMPY\x01\x00"  # of version 1.0, which NumPy takes unless a header is very long
NUMPY = "numpy.ndarray"
Packed = tuple[bytes, list[Any]]  # a pickle, and the bytes that it has left outside
FIELDS = ("dtype", "shape", "stype", "data")
_init, _numpy, _from_numpy = (Array.__dict__[name] for name in ("__init__", "numpy", "from_numpy_ndarray"))
# What flwr notes of a new array beside its fields.
NEW = {name: value for name, value in Array("", (), "", b"").__dict__.items() if name not in FIELDS}


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
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """What flwr calls the dtype, and how the file of such an array begins."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return str(dtype), file.getvalue()


class Lent(Array):
    """An array over memory that somebody lends, until its bytes are asked for: then it has its own."""

    __qualname__ = "Array"  # what flwr writes of it

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, memory: np.ndarray) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, _memory=memory)

    def __getattr__(self, name: str) -> Any:
        """``data``, as long as nobody has asked for it or set it."""
        if name != "data":
            raise AttributeError(name)
        self.own()
        return self.__dict__["data"]

    def own(self) -> None:
        """From now on it has bytes of its own."""
        memory = self.__dict__["_memory"]
        if "data" not in self.__dict__:  # nobody has set it
            self.__dict__["data"] = memory.tobytes()
        self.__dict__["_memory"] = None

    def __eq__(self, other: object) -> bool:
        fields = ("dtype", "shape", "stype", "data")
        return isinstance(other, Array) and all(getattr(self, field) == getattr(other, field) for field in fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def bytes_of(array: Array) -> Any:
    """``array.data``, without a copy: ``bytes``, or the memory that is lent."""
    memory = array.__dict__.get("_memory")  # first: once that is gone there is data
    return array.__dict__.get("data", memory)


def lent_in(content: RecordDict) -> list[Lent]:
    """Arrays among these records that have no bytes of their own."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return [array for record in records for array in record.values() if isinstance(array, Lent)]


def view(array: Array) -> np.ndarray | None:
    """The array over its own bytes, not to be written to; None if :meth:`Array.numpy` must read them."""
    data = bytes_of(array)
    if array.stype != NUMPY or bytes(data[:8]) != MAGIC:
        return None
    start = 10 + int.from_bytes(data[8:10], "little")
    layout = _layout(bytes(data[:start]))
    if layout is None or len(data) != start + layout[0].itemsize * prod(layout[1]):
        return None
    return np.frombuffer(data, layout[0], offset=start).reshape(layout[1])


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """``Array(dtype, shape, stype, data)`` of what needs no checks."""
    made = Array.__new__(Array)
    made.__dict__.update(NEW, dtype=dtype, shape=shape, stype=stype, data=data)
    return made


def _begin(array: Array, *args: Any, **given: Any) -> None:
    """``Array(…)``: its four fields, or what flwr must look at."""
    fields: Any = args if args else tuple(given.get(name) for name in FIELDS)
    if len(fields) == len(args) + len(given) == 4 and _plain(*fields):
        array.__dict__.update(NEW, **dict(zip(FIELDS, fields, strict=True)))
    elif len(args) == 1 and not given and type(args[0]) is np.ndarray:
        array.__dict__.update(_write(Array, args[0]).__dict__)
    else:
        _init(array, *args, **given)


def _plain(dtype: object, shape: object, stype: object, data: object) -> bool:
    right = type(dtype) is type(stype) is str and type(shape) is tuple and type(data) is bytes
    return right and all(type(length) is int for length in shape)  # type: ignore[attr-defined]


def _read(array: Array) -> np.ndarray:
    found = view(array)
    return _numpy(array) if found is None else found.copy()


def _write(cls: type[Array], ndarray: np.ndarray) -> Array:
    plain = type(ndarray) is np.ndarray and ndarray.dtype.kind in "biufc" and ndarray.flags.c_contiguous
    if not plain:
        return _from_numpy.__get__(None, cls)(ndarray)  # type: ignore[no-any-return]
    name, header = _header(ndarray.dtype, ndarray.shape)
    return _array(name, ndarray.shape, NUMPY, b"".join((header, ndarray.reshape(-1).view(np.uint8).data)))


@contextmanager
def quick_arrays() -> Iterator[None]:
    """Let all ``Array`` of this process read and write in this way."""
    patched: Any = Array
    patched.__init__, patched.numpy, patched.from_numpy_ndarray = _begin, _read, classmethod(_write)
    try:
        yield
    finally:
        patched.__init__, patched.numpy, patched.from_numpy_ndarray = _init, _numpy, _from_numpy


# --- from process to process -----------------------------------------------------------------------------------------


def _made(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    return Array(dtype, shape, stype, data if type(data) is bytes else bytes(data))


def lent(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    """An array of these fields; over ``data`` where that is not ``bytes`` of its own."""
    if type(data) is bytes:
        return _array(dtype, shape, stype, data)
    return Lent(dtype, shape, stype, np.frombuffer(data, np.uint8))


def _reduce(array: Array) -> tuple[Any, ...]:
    return _made, (array.dtype, array.shape, array.stype, pickle.PickleBuffer(bytes_of(array)))


class _Pickler(pickle.Pickler):
    """Leaves the bytes of arrays outside."""

    dispatch_table = {**dispatch_table, Array: _reduce, Lent: _reduce}  # noqa: RUF012  (pickle reads it from the class)


def pack(thing: object) -> Packed:
    """``thing`` pickled without the bytes of its arrays, and these bytes, not copied."""
    file, buffers = BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return file.getvalue(), [memoryview(buffer).obj for buffer in buffers]


def unpack(pickled: Any, buffers: Sequence[Any]) -> Any:
    """The inverse of :func:`pack`, of processes of our own; what is no ``bytes`` among ``buffers`` is copied."""
    return pickle.loads(pickled, buffers=buffers)
