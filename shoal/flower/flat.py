"""Answers as plain values, which go from process to process in half the time of flwr's objects.

An object's pickle names its class and its functions anew in each answer. What flwr or an app has made in another way
than usual stays an object.
"""

from __future__ import annotations

import pickle
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict

from shoal.flower.arrays import FIELDS, NEW, lent
from shoal.flower.turns import Answer

__all__ = ["flat", "full"]

KINDS = (RecordDict, ArrayRecord, MetricRecord, ConfigRecord)
NUMBERS: dict[Any, int] = {kind: number for number, kind in enumerate(KINDS)}
DICT, ARRAYS, OBJECT = 0, 1, -1
EMPTY: list[dict[str, Any]] = [kind().__dict__ for kind in KINDS]
# Beside what is in it a record has the state of its own upload, which begins anew elsewhere.
USUAL = EMPTY[DICT].keys() | {"_is_dirty", "_object_id"}
USUAL_ARRAY = NEW.keys() | {*FIELDS, "_object_id", "_chunks"}


def flat(answer: Answer) -> tuple[Any, ...]:
    """What :func:`full` takes, for a pickle that may leave the bytes of arrays outside."""
    reply = answer.reply
    if type(reply) is not Message or type(reply.metadata) is not Metadata:
        return (answer,)
    inside = dict(reply.__dict__)
    content, metadata = inside.pop("_content"), inside.pop("_metadata")
    state = None if answer.state is None else _flat(answer.state)
    content = None if content is None else _flat(content)
    return metadata.__dict__, content, inside, state, answer.reason, answer.traceback


def full(found: tuple[Any, ...]) -> Answer:
    """The answer; arrays whose bytes were left outside are :class:`~shoal.flower.arrays.Lent`."""
    if len(found) == 1:
        return found[0]  # type: ignore[no-any-return]
    about, content, inside, state, reason, traceback = found
    metadata, reply = Metadata.__new__(Metadata), Message.__new__(Message)
    metadata.__dict__.update(about)
    content = None if content is None else _full(*content)
    reply.__dict__.update(inside, _metadata=metadata, _content=content)
    return Answer(reply, None if state is None else _full(*state), reason, traceback)


def _flat(record: Any) -> tuple[int, Any]:
    kind, inside = NUMBERS.get(type(record), OBJECT), record.__dict__
    if kind == OBJECT or not inside.keys() <= USUAL:
        return OBJECT, record
    data: dict[str, Any] = inside["_data"]
    if kind == DICT:
        data = {name: _flat(value) for name, value in data.items()}
    elif kind == ARRAYS:
        data = {name: _flat_array(array) for name, array in data.items()}
    return kind, data


def _flat_array(array: Any) -> Any:
    if type(array) is not Array or not array.__dict__.keys() <= USUAL_ARRAY:
        return array
    return array.dtype, array.shape, array.stype, pickle.PickleBuffer(array.data)


def _full(kind: int, data: Any) -> Any:
    if kind == OBJECT:
        return data
    if kind == DICT:
        data = {name: _full(*value) for name, value in data.items()}
    elif kind == ARRAYS:
        data = {name: lent(*array) if type(array) is tuple else array for name, array in data.items()}
    record: Any = KINDS[kind].__new__(KINDS[kind])
    record.__dict__.update(EMPTY[kind], _data=data)
    return record
