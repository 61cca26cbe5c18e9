"""Layouts name every element of the flat vectors; two models fit exactly if their layouts are equal."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from shoal.protos.errors import InvalidUpdate
from shoal.protos.parameters import Entry, Layout, Parameters, Segment, frozen_hash

WEIGHT = Entry("net.weight", Segment.TRAINABLE, "float32", (2, 3))
MEAN = Entry("norm.mean", Segment.BUFFERS, "float32", (2,))
COUNT = Entry("norm.count", Segment.COUNTERS, "int64", ())
BIAS = Entry("net.bias", Segment.TRAINABLE, "float32", (2,))
HEAD = Entry("head", Segment.LOCAL, "float32", (2,))
BASE = Entry("base", Segment.FROZEN, "float16", (3,))
LAYOUT = Layout((WEIGHT, MEAN, COUNT, BIAS, HEAD, BASE))


def parameters() -> Parameters[np.ndarray]:
    return Parameters(
        LAYOUT,
        np.arange(8, dtype="float32"),
        np.array([0.5, 1.5], "float32"),
        np.array([4], "int64"),
        {"head": np.ones(2, "float32")},
        {"base": np.zeros(3, "float16")},
    )


def changed(**fields: object) -> Layout:
    return Layout((replace(WEIGHT, **fields), *LAYOUT.entries[1:]))  # type: ignore[arg-type]


def test_sizes_and_segments() -> None:
    assert {segment: LAYOUT.size(segment) for segment in Segment} == {
        Segment.TRAINABLE: 8,
        Segment.BUFFERS: 2,
        Segment.COUNTERS: 1,
        Segment.LOCAL: 2,
        Segment.FROZEN: 3,
    }
    assert LAYOUT.of(Segment.TRAINABLE) == (WEIGHT, BIAS)


def test_names_are_unique() -> None:
    with pytest.raises(InvalidUpdate, match=r"'net\.weight' twice"):
        Layout((WEIGHT, MEAN, replace(MEAN, name="net.weight")))


def test_one_dtype_for_what_is_averaged() -> None:
    assert Layout(()).dtype == "float32"
    assert LAYOUT.dtype == "float32"
    assert Layout((replace(WEIGHT, dtype="float64"), COUNT, HEAD)).dtype == "float64"
    with pytest.raises(InvalidUpdate, match=r"mix \['float32', 'float64'\]"):
        _ = Layout((WEIGHT, replace(MEAN, dtype="float64"))).dtype


OTHERS = [
    (changed(name="w"), r"tensor 'net\.weight' is missing"),
    (changed(shape=(3, 2)), r"tensor 'net\.weight' is trainable float32\[3, 2\], expected trainable float32\[2, 3\]"),
    (
        changed(dtype="float64"),
        r"tensor 'net\.weight' is trainable float64\[2, 3\], expected trainable float32\[2, 3\]",
    ),
    (changed(segment=Segment.LOCAL), r"is local float32\[2, 3\], expected trainable float32\[2, 3\]"),
    (Layout(LAYOUT.entries[:-1]), "tensor 'base' is missing"),
    (Layout((*LAYOUT.entries, replace(BASE, name="more"))), "tensor 'more' is not expected"),
    (Layout(LAYOUT.entries[::-1]), "the tensors stand in another order"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_whatever_differs_is_named_and_hashed(other: Layout, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(LAYOUT.difference(other))
    assert LAYOUT.hash != other.hash


def test_equal_layouts() -> None:
    twin = Layout(tuple(replace(entry) for entry in LAYOUT.entries))

    assert LAYOUT.difference(twin) is None
    assert LAYOUT.hash == twin.hash


def test_the_hash_is_the_same_in_every_version() -> None:
    assert LAYOUT.hash == "44ff50dda250e98adc4fdbae2cb57c1f0f44c08c63db987967cc82ae08ea07a0"


def test_locate() -> None:
    names = [LAYOUT.locate(Segment.TRAINABLE, index) for index in range(8)]

    assert names == ["net.weight"] * 6 + ["net.bias"] * 2
    assert LAYOUT.locate(Segment.COUNTERS, 0) == "norm.count"
    with pytest.raises(IndexError):
        LAYOUT.locate(Segment.TRAINABLE, 8)


def test_named_gives_every_tensor_its_name_and_shape() -> None:
    named = parameters().named()

    assert list(named) == [entry.name for entry in LAYOUT.entries]
    assert {name: value.shape for name, value in named.items()} == {e.name: e.shape for e in LAYOUT.entries}
    assert named["net.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert named["net.bias"].tolist() == [6, 7]
    assert named["norm.count"] == 4


def test_named_tensors_are_views() -> None:
    model = parameters()
    model.named()["net.bias"][0] = 9

    assert model.trainable[6] == 9


def test_map_converts_every_segment() -> None:
    lists = parameters().map(np.ndarray.tolist)

    assert lists == Parameters(LAYOUT, [*range(8)], [0.5, 1.5], [4], {"head": [1, 1]}, {"base": [0, 0, 0]})


def test_frozen_hash() -> None:
    a, b = np.ones(2, "float32"), np.zeros(2, "float32")

    assert frozen_hash({}) == ""
    assert frozen_hash({"a": a, "b": b}) == frozen_hash({"b": b, "a": a})
    assert len({frozen_hash(f) for f in ({"a": a, "b": b}, {"a": b, "b": a}, {"a": a}, {"c": a}, {"a": -a})}) == 5
    assert frozen_hash({"a": np.ones((2, 2))[:, 0]}) == frozen_hash({"a": np.ones(2)})


@pytest.mark.slow
def test_nothing_in_protos_needs_torch() -> None:
    code = """
import importlib, pkgutil, sys
import shoal.protos
for module in pkgutil.iter_modules(shoal.protos.__path__):
    importlib.import_module(f"shoal.protos.{module.name}")
print("codec" in {m.name for m in pkgutil.iter_modules(shoal.protos.__path__)}, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["True", "False"]
