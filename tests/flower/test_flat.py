"""Turns and answers as plain values: what comes out is what a pickle of them would give."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from shoal.flower.arrays import Lent, bytes_of
from shoal.flower.compat import context, identify, name_message, to_wire
from shoal.flower.flat import flat, flat_turn, full, full_turn
from shoal.flower.turns import Answer, Turn


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
    found["w"] = arrays = ArrayRecord()
    arrays[""], arrays["n"] = array(np.arange(6.0).reshape(2, 3)), array(np.zeros((0, 2), np.int8))
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
    expected, found = pickle.loads(pickle.dumps(answer)), full(crossed(flat(answer, []), outside))

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
    large, small = np.arange(2048.0).reshape(2, -1), np.arange(3)
    answer = Answer(Message(RecordDict({"w": ArrayRecord({"a": Array(large), "b": Array(small)})}), reply_to=asked()))
    found = full(crossed(flat(answer, []), outside=True))
    arrays: Any = found.reply.content["w"]

    assert isinstance(arrays["a"], Lent) and not isinstance(arrays["b"], Lent)
    np.testing.assert_array_equal(arrays["a"].numpy(), large)
    np.testing.assert_array_equal(arrays["b"].numpy(), small)


ODD: dict[str, Callable[[], Any]] = {
    "a list": lambda: MetricRecord({"of": [1.0]}),
    "another kind of number": lambda: MetricRecord({"n": np.float64(1)}),
    "a large array": lambda: ArrayRecord({"w": Array(np.zeros(2048))}),
    "own array": lambda: content(array=Float)["w"],
    "an attribute": lambda: noted()["w"],
}


@pytest.mark.parametrize("name", ODD)
def test_what_must_not_share_a_pickle_is_told(name: str) -> None:
    content, told, state = RecordDict({"r": ODD[name]()}), list[Any](), list[Any]()
    flat(Answer(Message(content, reply_to=asked()), RecordDict()), told)
    flat(Answer(Message(RecordDict(), reply_to=asked()), content), state)

    assert told and state


def test_an_error_and_an_apps_own_kinds_have_a_pickle_of_their_own() -> None:
    for name in ("error", "own record"):
        told = list[Any]()
        flat(ANSWERS[name](), told)

        assert told, name


def test_answers_of_one_pickle_have_what_was_in_the_record_that_they_share_in_their_time() -> None:
    metrics, arrays = MetricRecord(), ArrayRecord()
    told, made = list[Any](), list[Any]()
    for number in range(3):
        metrics["n"], arrays["w"] = number, Array(np.array([number]))
        reply = Message(RecordDict({"m": metrics, "w": arrays}), reply_to=asked())
        made.append(flat(Answer(reply, RecordDict({"m": metrics})), told))
    found: list[Any] = [full(one) for one in crossed(made, outside=False)]
    found[0].reply.content["m"]["n"] = 7

    assert told == []
    assert [answer.reply.content["m"]["n"] for answer in found] == [7, 1, 2]
    assert [answer.state["m"]["n"] for answer in found] == [0, 1, 2]
    assert [int(answer.reply.content["w"]["w"].numpy()[0]) for answer in found] == [0, 1, 2]


def test_what_comes_out_can_be_filled_and_is_checked() -> None:
    found: Any = full(crossed(flat(ANSWERS["usual"](), []), outside=False)).reply.content
    found["m"]["more"] = 2.5
    found["new"] = ConfigRecord({"a": 1})

    assert found["m"]["more"] == 2.5 and list(found.config_records) == ["c", "new"]
    with pytest.raises(TypeError):
        found["m"]["more"] = "text"


@pytest.mark.parametrize("kind", [RecordDict, Own])
def test_a_turn_crosses_as_its_pickle_does(kind: type[RecordDict]) -> None:
    about: Context = context(7, 5, {"partition-id": 3}, {"lr": 0.5})
    about.state = content(kind)
    turn = Turn(asked().metadata, about, 11, 2)
    expected, found = pickle.loads(pickle.dumps(turn)), full_turn(crossed(flat_turn(turn), outside=False))

    assert found.metadata.__dict__ == expected.metadata.__dict__ and (found.seed, found.round) == (11, 2)
    assert parts(found.context.state) == parts(expected.context.state)
    for field in ("run_id", "node_id", "node_config", "run_config"):
        assert getattr(found.context, field) == getattr(expected.context, field)


def test_turns_of_one_pickle_have_one_run_config() -> None:
    config: dict[str, Any] = {"lr": 0.5}
    turns = [Turn(asked().metadata, context(7, node, {"partition-id": node}, config), 1) for node in range(2)]
    first, second = map(full_turn, crossed(list(map(flat_turn, turns)), outside=False))

    assert first.context.run_config is second.context.run_config
    assert first.context.node_config == {"partition-id": 0} and second.context.node_config == {"partition-id": 1}
