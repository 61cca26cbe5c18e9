"""Turns and answers as plain values, which go from process to process in a part of the time of flwr's objects.

An object's pickle names its class and its functions each time. What flwr or an app has made in another way than usual
stays an object.
"""

from __future__ import annotations

import pickle
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict

from shoal.flower.arrays import FIELDS, NEW, lent
from shoal.flower.turns import Answer, Turn
from shoal.simulations.answers import SHARE_FROM

__all__ = ["flat", "flat_turn", "full", "full_turn"]

KINDS = (RecordDict, ArrayRecord, MetricRecord, ConfigRecord)
NUMBERS: dict[Any, int] = {kind: number for number, kind in enumerate(KINDS)}
DICT, ARRAYS, OBJECT = 0, 1, -1
EMPTY: list[dict[str, Any]] = [kind().__dict__ for kind in KINDS]
# Beside what is in it a record has the state of its own upload, which begins anew elsewhere.
USUAL = EMPTY[DICT].keys() | {"_is_dirty", "_object_id"}
PLAIN = frozenset((bool, bytes, float, int, str))  # of which nobody can change a value, nor spoil its pickle
USUAL_ARRAY = NEW.keys() | {*FIELDS, "_object_id", "_chunks"}


def flat(answer: Answer, odd: list[Any]) -> tuple[Any, ...]:
    """What :func:`full` takes, for a pickle that may leave the bytes of large arrays outside.

    ``odd`` gets what had better have a pickle of its own: what an app may change later, what may not be picklable, and
    large arrays. Without any the answer is made of copies, and can share a pickle with others.
    """
    reply = answer.reply
    if type(reply) is not Message or type(reply.metadata) is not Metadata:
        odd.append(answer)
        return (answer,)
    inside = dict(reply.__dict__)
    content, metadata = inside.pop("_content"), inside.pop("_metadata")
    if any(value is not None for value in inside.values()):  # an error, or what an app has added
        odd.append(inside)
    state = None if answer.state is None else _flat(answer.state, odd)
    content = None if content is None else _flat(content, odd)
    return dict(metadata.__dict__), content, inside, state, answer.reason, answer.traceback


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


def flat_turn(turn: Turn) -> tuple[Any, ...]:
    """What :func:`full_turn` takes, for a pickle at once."""
    about = turn.context
    if type(turn.metadata) is not Metadata:
        return (turn,)
    where = about.run_id, about.node_id, about.node_config, _flat(about.state, []), about.run_config
    return turn.metadata.__dict__, where, turn.seed, turn.round


def full_turn(found: tuple[Any, ...]) -> Turn:
    """The turn; those of one pickle share their run config."""
    if len(found) == 1:
        return found[0]  # type: ignore[no-any-return]
    about, (run_id, node_id, node_config, state, run_config), seed, round = found
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(about)
    return Turn(metadata, Context(run_id, node_id, node_config, _full(*state), run_config), seed, round)


def _flat(record: Any, odd: list[Any]) -> tuple[int, Any]:
    kind, inside = NUMBERS.get(type(record), OBJECT), record.__dict__
    if kind == OBJECT or not inside.keys() <= USUAL:
        odd.append(record)
        return OBJECT, record
    data: dict[str, Any] = inside["_data"]
    if kind == DICT:
        return kind, {name: _flat(value, odd) for name, value in data.items()}
    if kind == ARRAYS:
        return kind, {name: _flat_array(array, odd) for name, array in data.items()}
    if not PLAIN.issuperset(map(type, data.values())):
        odd.append(data)
    return kind, dict(data)


def _flat_array(array: Any, odd: list[Any]) -> Any:
    if type(array) is not Array or not array.__dict__.keys() <= USUAL_ARRAY:
        odd.append(array)
        return array
    data: Any = array.data
    if len(data) >= SHARE_FROM:
        odd.append(array)
        data = pickle.PickleBuffer(data)
    return array.dtype, array.shape, array.stype, data


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
