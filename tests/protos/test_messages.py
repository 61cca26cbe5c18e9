"""An update that must not be counted is refused by name: which client, which round, which tensor, what to do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.protos.errors import InvalidUpdate
from shoal.protos.messages import Failure, Kind, Spec, Task, Update, check_update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment

LAYOUT = Layout(
    (
        Entry("net.weight", Segment.TRAINABLE, "float32", (2, 2)),
        Entry("norm.mean", Segment.BUFFERS, "float32", (1,)),
        Entry("net.bias", Segment.TRAINABLE, "float32", (2,)),
        Entry("norm.var", Segment.BUFFERS, "float32", (1,)),
        Entry("norm.count", Segment.COUNTERS, "int64", ()),
        Entry("head", Segment.LOCAL, "float32", (5,)),
    )
)
TENSORS = {"c": Spec("float32", (6,)), "norm": Spec("float64", ()), "mask": Spec("bool", (2, 3))}


def floats(count: int, at: int | None = None, value: float = math.nan) -> np.ndarray:
    vector = np.ones(count, "float32")
    if at is not None:
        vector[at] = value
    return vector


GOOD: Update[np.ndarray] = Update(
    floats(6),
    10,
    5,
    0.5,
    {"c": floats(6), "norm": np.array(1.0), "mask": np.ones((2, 3), bool)},
    floats(2),
    np.array([3], "int64"),
    {"loss": 0.1},
)


def check(**changes: Any) -> None:
    check_update(replace(GOOD, **changes), LAYOUT, TENSORS, "phone", 3)


def test_a_good_update_passes() -> None:
    check()
    check(examples=0, steps=0.0, lr_sum=0)


def test_a_model_of_nothing_but_weights() -> None:
    layout = Layout((Entry("w", Segment.TRAINABLE, "float64", (2,)),))

    check_update(Update(np.zeros(2), 1), layout)
    with pytest.raises(InvalidUpdate, match=r"^the update has delta of float32\[2\], expected float64\[2\]"):
        check_update(Update(floats(2), 1), layout)


@pytest.mark.parametrize("field", ["examples", "steps", "lr_sum"])
@pytest.mark.parametrize("number", [-1, -0.5, math.nan, math.inf, -math.inf, "3", None, 1j, np.ones((2, 1))])
@pytest.mark.fault(11)
def test_impossible_numbers(field: str, number: object) -> None:
    with pytest.raises(InvalidUpdate, match=f"client 'phone' in round 3 reports {field}="):
        check(**{field: number})


@pytest.mark.fault(11)
def test_an_absurd_number_of_examples() -> None:
    with pytest.raises(InvalidUpdate, match="examples="):
        check(examples=10**400)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("at", "name"), [(0, "net.weight"), (3, "net.weight"), (4, "net.bias")])
@pytest.mark.fault(8)
def test_a_delta_that_is_not_finite(value: float, at: int, name: str) -> None:
    with pytest.raises(InvalidUpdate, match=rf"holds {value} in its delta in tensor '{name}': .*lower local\.lr"):
        check(delta=floats(6, at, value))


@pytest.mark.fault(8)
def test_buffers_that_are_not_finite() -> None:
    with pytest.raises(InvalidUpdate, match=r"holds nan in its buffers in tensor 'norm\.var'"):
        check(buffers=floats(2, 1))


@pytest.mark.fault(8)
def test_a_strategy_s_tensor_that_is_not_finite() -> None:
    with pytest.raises(InvalidUpdate, match=r"holds nan in its c in tensor 'net\.bias'"):
        check(tensors={**GOOD.tensors, "c": floats(6, 5)})
    with pytest.raises(InvalidUpdate, match="holds inf in its norm: "):
        check(tensors={**GOOD.tensors, "norm": np.array(np.inf)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": floats(1)}, r"delta of float32\[1\], expected float32\[6\]; build the same model"),
        ({"delta": floats(7)}, r"delta of float32\[7\], expected float32\[6\]"),
        ({"delta": floats(6).reshape(1, 6)}, r"delta of float32\[1, 6\], expected float32\[6\]"),
        ({"delta": np.ones(6)}, r"delta of float64\[6\], expected float32\[6\]"),
        ({"delta": np.ones(6, "int32")}, r"delta of int32\[6\], expected float32\[6\]"),
        ({"buffers": floats(3)}, r"buffers of float32\[3\], expected float32\[2\]"),
        ({"buffers": None}, "has no buffers; the model has 2"),
        ({"counters": None}, "has no counters; the model has 1"),
        ({"counters": floats(1)}, r"counters of float32\[1\], expected int64\[1\]"),
        ({"tensors": {}}, r"brings tensors \[\], but \['c', 'mask', 'norm'\] are declared"),
        ({"tensors": {**GOOD.tensors, "d": floats(1)}}, r"brings tensors \['c', 'd', 'mask', 'norm'\], but"),
        ({"tensors": {**GOOD.tensors, "c": floats(1)}}, r"c of float32\[1\], expected float32\[6\]"),
        (
            {"tensors": {**GOOD.tensors, "mask": np.ones((2, 3), "int8")}},
            r"mask of int8\[2, 3\], expected bool\[2, 3\]",
        ),
    ],
)
@pytest.mark.fault(9)
def test_what_does_not_fit_the_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidUpdate, match=f"client 'phone' in round 3 .*{message}"):
        check(**changes)


@pytest.mark.fault(9)
def test_what_the_model_does_not_have() -> None:
    layout = Layout((Entry("w", Segment.TRAINABLE, "float32", (6,)),))
    plain = Update(floats(6), 1)

    check_update(plain, layout)
    with pytest.raises(InvalidUpdate, match="has unexpected buffers; the model has 0"):
        check_update(replace(plain, buffers=floats(0)), layout)
    with pytest.raises(InvalidUpdate, match="has unexpected counters; the model has 0"):
        check_update(replace(plain, counters=np.ones(1, "int64")), layout)


def test_checking_changes_nothing() -> None:
    before = [GOOD.delta.tobytes(), dict(GOOD.tensors), GOOD.metrics]
    check()

    assert before == [GOOD.delta.tobytes(), GOOD.tensors, GOOD.metrics]


def test_map_converts_vectors_and_leaves_numbers() -> None:
    mapped = GOOD.map(np.ndarray.tolist)

    assert mapped.delta == [1] * 6
    assert mapped.tensors == {"c": [1] * 6, "norm": 1, "mask": [[True] * 3] * 2}
    assert (mapped.buffers, mapped.counters) == ([1, 1], [3])
    assert (mapped.examples, mapped.steps, mapped.lr_sum, mapped.metrics) == (10, 5, 0.5, {"loss": 0.1})
    assert Update(floats(1), 1).map(np.ndarray.tolist).buffers is None


def test_sent_is_the_strategy_s_part_of_a_task() -> None:
    model = Parameters(LAYOUT, floats(6), floats(2), np.array([3]))
    task = Task(Kind.TRAIN, 1, 0, model, {"c": floats(6)}, {"mu": 0.1})

    assert task.sent.parameters is model.trainable
    assert (task.sent.tensors, task.sent.settings) == (task.tensors, task.settings)


def test_a_failure_fits_into_a_header_whatever_is_in_it() -> None:
    told = Failure("a", 1, "no file 'x\udcff'" + "y" * 30_000, "z" * 30_000 + "end").sendable()

    assert len(told.reason) == 20_000 and told.reason.startswith("no file 'x?'")
    assert len(told.traceback) == 20_000 and told.traceback.endswith("end")
    assert (told.client, told.round) == ("a", 1)
