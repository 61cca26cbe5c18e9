"""The mean of replies, piece by piece: flwr's to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import fedavg

from shoal.flower import sums
from shoal.flower.sums import quick_sums

SHAPES = [(5,), (2, 3), (), (0, 4), (70_000,)]
where: Any = fedavg
flwrs = where.aggregate_arrayrecords


def replies(arrays: list[np.ndarray], weights: list[float]) -> list[RecordDict]:
    return [
        RecordDict({"metrics": MetricRecord({"n": weight}), "arrays": ArrayRecord({"w": Array(array)})})
        for array, weight in zip(arrays, weights, strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "bool", "complex64", ">f4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_flwrs_to_the_bit(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    given = replies([np.asarray(rng.normal(size=shape) * 3).astype(dtype) for _ in range(4)], [1, 2.5, 3, 0.1])
    expected = flwrs(given, "n")["w"]
    with quick_sums():
        found = where.aggregate_arrayrecords(given, "n")["w"]

    assert where.aggregate_arrayrecords is flwrs
    assert found == expected


def test_arrays_that_differ_are_added_up_as_flwr_does() -> None:
    fortran, wide = np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(6.0).reshape(2, 3)
    for arrays in ([fortran, wide], [wide, wide.astype("float32")], [wide, wide[:1]]):
        given = replies(arrays, [1, 2])
        assert sums._aggregated(given, "n") == flwrs(given, "n")


def test_several_records_in_a_reply_are_taken_in_flwrs_order() -> None:
    given = replies([np.arange(3.0), np.arange(3.0) / 7], [1, 2])
    for content in given:
        content["more"] = ArrayRecord({"b": Array(np.ones(2)), "w": Array(np.arange(3.0) / 3)})
    expected = flwrs(given, "n")
    found = sums._aggregated(given, "n")

    assert list(found) == list(expected) and found == expected
