"""Changes to a protobuf message that leave it one: most random bytes are refused by its parser, unseen by our code."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["mutated"]

NUMBERS = (
    0,
    1,
    2,
    7,
    31,
    32,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -1,
    -(2**31),
    -(2**63),
)
REALS = (0.0, -0.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "delta",
    "trainable",
    "buffers",
    "counters",
    "tensor",
    "float32",
    "bfloat16",
    "int64",
    "bool",
    "little",
    "x" * 600,
    "é\0\n",
)
WIDTH = {FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31), FieldDescriptor.CPPTYPE_UINT32: (0, 2**32)}
WIDTH |= {FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63), FieldDescriptor.CPPTYPE_UINT64: (0, 2**64)}


def mutated(message: Message, rng: random.Random) -> None:
    """Change one field, somewhere in the message; a message without fields stays as it is."""
    holder = _somewhere(message, rng)
    if not holder.DESCRIPTOR.fields:
        return
    field: Any = rng.choice(list(holder.DESCRIPTOR.fields))
    if not field.is_repeated:
        _set(holder, field, rng)
        return
    items = getattr(holder, field.name)
    if items and rng.random() < 0.5:
        del items[rng.randrange(len(items))]
    elif field.message_type is None:
        items.append(_value(field, rng))
    elif items:
        items.add().CopyFrom(rng.choice(items))
    else:
        mutated(items.add(), rng)


def _somewhere(message: Message, rng: random.Random) -> Message:
    """The message itself or one within it, each as likely."""
    found, waiting = list[Message](), [message]
    while waiting:
        found.append(waiting.pop())
        for field, value in found[-1].ListFields():
            if field.message_type is not None:
                waiting += list(value) if field.is_repeated else [value]
    return rng.choice(found)


def _set(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is None:
        setattr(message, field.name, _value(field, rng))
    else:
        getattr(message, field.name).SetInParent()


def _value(field: FieldDescriptor, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind in WIDTH:
        low, high = WIDTH[kind]
        return rng.choice([number for number in NUMBERS if low <= number < high])
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return rng.randbytes(rng.choice((0, 4, 32))) if field.type == FieldDescriptor.TYPE_BYTES else rng.choice(TEXTS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice(list(field.enum_type.values)).number  # type: ignore[union-attr]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    return rng.choice(REALS)
