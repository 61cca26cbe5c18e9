"""Records filled and looked at without flwr's detours: the same contents, the same checks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from shoal.flower.records import quick_records


@pytest.fixture
def content() -> Iterator[Any]:
    with quick_records():
        yield RecordDict({"a": ArrayRecord({"w": Array(np.ones(2))}), "m": MetricRecord({"n": 1}), "c": ConfigRecord()})


def test_records_of_a_kind(content: Any) -> None:
    assert (list(content.array_records), list(content.metric_records), list(content.config_records)) == (
        ["a"],
        ["m"],
        ["c"],
    )
    content.metric_records["more"] = MetricRecord({"x": 2.0})
    del content.array_records["a"]
    assert list(content) == ["m", "c", "more"]


def test_what_does_not_belong_there_is_refused(content: Any) -> None:
    with pytest.raises(TypeError, match="MetricRecord"):
        content.metric_records["c"] = ConfigRecord()
    with pytest.raises(TypeError):
        content["m"]["n"] = True
    with pytest.raises(TypeError):
        content["x"] = {}
    with pytest.raises(TypeError):
        content["a"][1] = Array(np.ones(2))


def test_arrays_are_gone_with_their_records(content: Any) -> None:
    array = weakref.ref(content.array_records["a"]["w"])
    gc.disable()
    try:
        content.clear()
        assert array() is None
    finally:
        gc.enable()


def test_flwr_has_its_own_back() -> None:
    kind: Any = next(kind for kind in RecordDict.__mro__ if kind.__name__ == "TypedDict")
    before = kind.__setitem__, RecordDict.__dict__["array_records"]
    with quick_records():
        assert kind.__setitem__ is not before[0]

    assert (kind.__setitem__, RecordDict.__dict__["array_records"]) == before
