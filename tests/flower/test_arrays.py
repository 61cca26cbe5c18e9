"""Arrays written and read without flwr's file objects: the same bytes, the same values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from shoal.flower.arrays import Lent, pack, quick_arrays, unpack, view

KINDS = [
    np.arange(5.0),
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(6, dtype=np.float16).reshape(2, 3).T,  # in Fortran's order
    np.array(3, dtype=np.int64),
    np.zeros((0, 4)),
    np.arange(10)[::2],
    np.array([1, 2], dtype=">f4"),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array(["a", "bc"]),
    np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
]


@pytest.mark.parametrize("array", KINDS, ids=lambda array: f"{array.dtype} {array.shape}")
def test_arrays_are_flwrs_to_the_byte(array: np.ndarray) -> None:
    flwrs = Array(array)
    with quick_arrays():
        ours, read = Array(array), flwrs.numpy()

    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (flwrs.dtype, flwrs.shape, flwrs.stype, flwrs.data)
    array = flwrs.numpy()
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.flags.f_contiguous == array.flags.f_contiguous
    assert read.tobytes() == array.tobytes() and read.flags.writeable


FIELDS = {"dtype": "float32", "shape": (2,), "stype": "numpy.ndarray", "data": b"12345678"}
GIVEN: list[tuple[list[Any], dict[str, Any]]] = [
    ([*FIELDS.values()], {}),
    ([], FIELDS),
    ([], {"ndarray": np.ones(3)}),
    ([np.float64(3.0)], {}),
    (["float32", [2], "numpy.ndarray", b"12345678"], {}),
    (["float32", (2.0,), "numpy.ndarray", b"12345678"], {}),
    (["float32", (2,), "numpy.ndarray", "12345678"], {}),
    (["float32", (2,), "numpy.ndarray"], {"data": b"12345678"}),
    (["float32", (2,), "numpy.ndarray", b"12345678"], {"data": b"12345678"}),
    ([], FIELDS | {"ndarray": np.ones(3)}),
    ([np.ones(3)], {"stype": "numpy.ndarray"}),
    ([], {}),
]


@pytest.mark.parametrize(("args", "given"), GIVEN)
def test_what_an_array_is_made_of(args: list[Any], given: dict[str, Any]) -> None:
    def made() -> dict[str, Any] | str:
        try:
            return dict(Array(*args, **given).__dict__)
        except Exception as error:
            return type(error).__name__

    flwrs = made()
    with quick_arrays():
        assert made() == flwrs


@pytest.mark.parametrize("data", [b"", b"no array", Array(np.zeros(3)).data[:-1], Array(np.zeros(3)).data + b"x"])
def test_what_is_no_array_is_left_to_numpy(data: bytes) -> None:
    array = Array("float64", (3,), "numpy.ndarray", data)

    assert view(array) is None
    if not data.endswith(b"x"):  # NumPy does not mind what follows
        with quick_arrays(), pytest.raises((ValueError, EOFError)):
            array.numpy()


def test_arrays_cross_without_copies() -> None:
    content = RecordDict({"a": ArrayRecord({"w": Array(np.arange(5.0))})})
    data = content.array_records["a"]["w"].data
    pickled, buffers = pack(content)
    there, copied = unpack(pickled, buffers), unpack(pickled, [memoryview(bytearray(buffers[0]))])

    assert buffers[0] is data is there["a"]["w"].data and len(pickled) < 600
    assert there == copied == content
    assert type(copied["a"]["w"].data) is bytes


def test_an_array_over_lent_memory_is_flwrs_in_every_way() -> None:
    flwrs = Array(np.arange(5.0))
    memory = np.frombuffer(bytearray(flwrs.data), np.uint8)

    def lent() -> Lent:
        return Lent(flwrs.dtype, flwrs.shape, flwrs.stype, memory)

    assert lent() == flwrs and flwrs == lent() and lent() != Array(np.zeros(5)) and repr(lent()) == repr(flwrs)
    assert isinstance(lent(), Array) and lent().object_id == flwrs.object_id
    for copy_of in (
        copy.copy,
        copy.deepcopy,
        lambda array: pickle.loads(pickle.dumps(array)),
        lambda a: unpack(*pack(a)),
    ):
        assert type(copy_of(lent())) is Array and copy_of(lent()) == flwrs
    with quick_arrays():
        array = lent()
        read = array.numpy()
        memory[-8:] = 0  # as if it were lent again
        assert np.array_equal(read, np.arange(5.0))
    changed = lent()
    changed.data = flwrs.data
    changed.own()
    assert changed == flwrs and lent() != flwrs


def test_flwr_has_its_own_back() -> None:
    before = Array.__dict__["numpy"]
    with quick_arrays():
        assert Array.__dict__["numpy"] is not before

    assert Array.__dict__["numpy"] is before
