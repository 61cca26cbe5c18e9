"""Target: whatever a decoder is given, it answers with a value or with a CodecError that says why.

An input is: which decoder, the header's length in two bytes, the header, the payload.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from shoal.protos import codec
from shoal.protos import fleet_pb2 as wire
from shoal.protos.assignment import Assignment
from shoal.protos.codec import Value, encode
from shoal.protos.errors import CodecError, ShoalError
from shoal.protos.experiment import Component
from shoal.protos.messages import Envelope, Failure, Kind, Measurement, Spec, Task, Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from tests.fuzz.mutation import mutated

__all__ = ["mutate", "run", "seeds"]

TRAINABLE, COUNTERS = Segment.TRAINABLE, Segment.COUNTERS
LAYOUT = Layout(
    (
        Entry("w", TRAINABLE, "float32", (2, 2)),
        Entry("n", COUNTERS, "int64", ()),
        Entry("b", TRAINABLE, "float32", (1,)),
    )
)
VALUES: Sequence[Value] = (
    Task(
        Kind.TRAIN,
        3,
        2,
        Parameters(LAYOUT, np.zeros(5, np.float32), np.zeros(0, np.float32), np.zeros(1, np.int64)),
        {"control": np.ones(5, np.float32)},
        {"mu": 0.1, "flags": [True, 1, "x", b"y", [2.0]]},
        {"control": Spec("float32", (5,))},
    ),
    Update(np.ones(5, np.float32), 7, 2, 0.2, {"c": np.ones(3, bool)}, None, np.ones(1, np.int64), {"loss": 0.5}),
    Measurement({"accuracy": 0.5, "examples": 3}),
    Envelope(3, np.arange(5, dtype=np.uint8), {"metadata": b"to whom", "seed": 7}),
    Failure("a", 3, "it broke", "Traceback …"),
)
ASSIGNMENT = Assignment(
    strategy=Component(name="fedavg"), local={"lr": 0.1}, model=Component(name="linear"), seed=0, dtype="float32"
)


def _task(header: bytes, payload: bytes) -> object:
    return codec.decode_task(header, payload)


def _update(header: bytes, payload: bytes) -> object:
    """What was accepted can be sent on, and comes back bit for bit (its tensors may have stood in another order)."""
    update = codec.decode_update(header, payload)
    again, buffers = encode(update)
    back = codec.decode_update(again, b"".join(buffers))
    assert back.delta.tobytes() == update.delta.tobytes()
    assert {k: v.tobytes() for k, v in back.tensors.items()} == {k: v.tobytes() for k, v in update.tensors.items()}
    assert (back.examples, back.steps, back.metrics) == (update.examples, update.steps, update.metrics)
    return update


DECODERS: Sequence[Callable[[bytes, bytes], Any]] = (
    _task,
    _update,
    codec.decode_measurement,
    codec.decode_failure,
    lambda header, payload: codec.content_of(header),
    lambda header, payload: codec.decode_update(header, None),
    codec.decode_envelope,
    lambda header, payload: Assignment.decode(payload),
)


def run(data: bytes) -> None:
    """One input. Anything but a CodecError goes through."""
    if len(data) < 3:
        return
    end = 3 + int.from_bytes(data[1:3], "big")
    try:
        DECODERS[data[0] % len(DECODERS)](data[3:end], data[end:])
    except CodecError as error:
        assert str(error)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The same with another header, that may fit its payload and its layout again."""
    end = 3 + int.from_bytes(data[1:3], "big")
    try:
        header = wire.Header.FromString(data[3:end])
    except DecodeError:
        return data
    mutated(header, rng)
    if rng.random() < 0.5:
        header.manifest.sha256 = hashlib.sha256(data[end:]).digest()
    if header.HasField("task") and rng.random() < 0.5:
        with suppress(ValueError, ShoalError):  # a segment that there is not, a name that stands there twice
            header.task.layout_hash = _hash(header.task.layout)
    return _input(data[0], header.SerializeToString(), data[end:])


def _hash(entries: Sequence[wire.Entry]) -> str:
    return Layout(tuple(Entry(e.name, Segment(e.segment), e.dtype, tuple(e.shape)) for e in entries)).hash


def seeds() -> list[bytes]:
    """Right inputs, from which damaged ones are made."""
    found = [_input(len(DECODERS) - 1, b"", ASSIGNMENT.encode())]
    for value in VALUES:
        header, buffers = encode(value)
        found += [_input(decoder, header, b"".join(buffers)) for decoder in range(len(DECODERS) - 1)]
    return found


def _input(decoder: int, header: bytes, payload: bytes) -> bytes:
    return bytes([decoder]) + len(header).to_bytes(2, "big") + header + payload
