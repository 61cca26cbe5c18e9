"""Answers as plain values: what comes out is what a pickle of the answer would give."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from shoal.flower.arrays import Lent, bytes_of
from shoal.flower.compat import identify, name_message, to_wire
from shoal.flower.flat import flat, full
from shoal.flower.turns import Answer


class Own(RecordDict):
    """An app's kind of record."""


class Float(Array):
    """An app's kind of array."""


def asked() -> Message:
    identify(7)
    message = Message(RecordDict(), 5, "train.own", group_id="3", ttl=9.0)
    name_message(message, "ab")
    return message


def content(kind: type[RecordDict] = RecordDict, array: type[Array] = Array) -> RecordDict:
    found: RecordDict = kind()
    found["w"] = ArrayRecord({"": array(np.arange(6.0).reshape(2, 3)), "n": array(np.zeros((0, 2), np.int8))})
    found["m"] = MetricRecord({"loss": np.float64(0.5), "n": 3, "of": [1.0, 2.0]})
    found["c"] = ConfigRecord({"b": b"\x00", "t": True, "s": ["a", ""]})
    return found


def noted() -> RecordDict:
    found: Any = content()
    found["w"].note = "mine"
    return found  # type: ignore[no-any-return]


ANSWERS = {
    "usual": lambda: Answer(Message(content(), reply_to=asked()), content()),
    "empty": lambda: Answer(Message(RecordDict(), reply_to=asked()), RecordDict()),
    "error": lambda: Answer(Message(Error(3, "no"), reply_to=asked()), None, "no", "Traceback"),
    "own record": lambda: Answer(Message(content(Own), reply_to=asked()), content()),
    "own array": lambda: Answer(Message(content(array=Float), reply_to=asked()), content()),
    "an attribute": lambda: Answer(Message(noted(), reply_to=asked()), noted()),
}


def crossed(thing: Any, outside: bool) -> Any:
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(thing, 5, buffer_callback=buffers.append if outside else None)
    return pickle.loads(pickled, buffers=[np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers])


def parts(record: Any) -> Any:
    """All there is to see of it."""
    about = type(record).__name__, getattr(record, "note", None)
    if isinstance(record, Array):
        return type(record).__qualname__, record.dtype, record.shape, record.stype, bytes(bytes_of(record))
    if isinstance(record, RecordDict | ArrayRecord):
        return about, [(name, parts(value)) for name, value in record.items()]
    return about, [(name, type(value), value) for name, value in record.items()]


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_crosses_as_its_pickle_does(name: str, outside: bool) -> None:
    answer = ANSWERS[name]()
    expected, found = pickle.loads(pickle.dumps(answer)), full(crossed(flat(answer), outside))

    assert (found.reason, found.traceback) == (answer.reason, answer.traceback)
    assert found.reply.metadata.__dict__ == expected.reply.metadata.__dict__
    assert found.reply.has_error() == expected.reply.has_error()
    if found.reply.has_error():
        assert found.reply.error.__dict__ == expected.reply.error.__dict__ and found.state is None
    else:
        assert parts(found.reply.content) == parts(expected.reply.content)
        assert parts(found.state) == parts(expected.state)
        assert to_wire(found.reply.content) == to_wire(expected.reply.content)


def test_arrays_whose_bytes_stay_outside_are_lent() -> None:
    found = full(crossed(flat(ANSWERS["usual"]()), outside=True))
    arrays: Any = found.reply.content["w"]

    assert isinstance(arrays[""], Lent)
    np.testing.assert_array_equal(arrays[""].numpy(), np.arange(6.0).reshape(2, 3))


def test_what_comes_out_can_be_filled_and_is_checked() -> None:
    found: Any = full(crossed(flat(ANSWERS["usual"]()), outside=False)).reply.content
    found["m"]["more"] = 2.5
    found["new"] = ConfigRecord({"a": 1})

    assert found["m"]["more"] == 2.5 and list(found.config_records) == ["c", "new"]
    with pytest.raises(TypeError):
        found["m"]["more"] = "text"
