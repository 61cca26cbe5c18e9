"""The exact wire form of :class:`Task`, :class:`Update`, :class:`Measurement` and :class:`Failure`.

A value becomes a *header* (a protobuf message, see ``fleet.proto``) and a *payload* (the raw little-endian bytes of
its tensors). Encoding copies no contiguous tensor, decoding returns read-only views on the payload. Bits cross
unchanged: whether numbers may be counted is for :func:`shoal.protos.messages.check_update` to say.

- Local tensors stand in the layout, but their values stay where they are: a decoded model has ``local={}``.
- Of frozen tensors only :func:`frozen_hash` crosses: a decoded model has ``frozen={}``, and :func:`decode_task` returns
  the hash beside the task.
- bfloat16 crosses as its bits; numpy has no such type, so arrays and a ``Spec`` say ``uint16``, a layout ``bfloat16``.

Nothing from a peer is believed: sizes and names are checked against the payload and :class:`Limits` before a view is
made, no memory is allocated on a peer's word, and whatever is wrong is a :class:`CodecError`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, EncodeError

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError, InvalidUpdate
from shoal.protos.manifest import (
    DTYPES,
    LIMITS,
    ON_WIRE,
    TENSOR,
    Arrays,
    Limits,
    at_most,
    check_manifest,
    check_names,
    hollow,
    known_dtype,
    quote,
    shape_of,
    views,
    wire_dtype,
    write_manifest,
)
from shoal.protos.messages import Envelope, Failure, Kind, Measurement, Setting, Spec, Task, Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment, frozen_hash
from shoal.protos.settings import read_metrics, read_number, read_settings, write_metrics, write_number, write_settings

__all__ = [
    "content_of",
    "decode_envelope",
    "decode_failure",
    "decode_measurement",
    "decode_task",
    "decode_update",
    "encode",
    "readdressed",
]

MODEL = ("trainable", "buffers", "counters")

Value = Task[np.ndarray] | Update[np.ndarray] | Measurement | Envelope | Failure
E = TypeVar("E", bound=StrEnum)


def encode(value: Value, *, limits: Limits = LIMITS) -> tuple[bytes, list[memoryview]]:
    """The header and the parts of the payload, to be sent one after the other."""
    try:
        header, arrays = _write(value)
        buffers = write_manifest(header.manifest, arrays)
        data = header.SerializeToString()
    except (EncodeError, TypeError, ValueError) as error:
        what = type(value).__name__.lower()
        raise CodecError(f"the {what} has no wire form: {error}; give each field its declared type") from error
    # Read by the receiver's own rules, so that what leaves here is not refused there.
    at_most(limits.header, len(data), "bytes in the header")
    check_manifest(header.manifest, header.manifest.total_bytes, limits)
    _read(header, arrays, limits)
    return data, buffers


def decode_task(
    header: bytes, payload: bytes | memoryview, *, limits: Limits = LIMITS, verify: bool = True
) -> tuple[Task[np.ndarray], str]:
    """The task, and the hash of the frozen tensors that its model needs (``""`` for none).

    Without ``verify`` the payload's SHA-256 is not compared: for a transport that has done so already.
    """
    message, arrays = _open("task", header, payload, limits, verify)
    return _read_task(message.task, arrays, limits), message.task.frozen_hash


def content_of(header: bytes, *, limits: Limits = LIMITS) -> tuple[str, bytes, int]:
    """What a header brings (``"update"``, …), and the SHA-256 and length in bytes of its payload."""
    message = _parse(header, "header", limits)
    check_manifest(message.manifest, message.manifest.total_bytes, limits)
    if len(message.manifest.sha256) != 32:
        raise CodecError(f"the SHA-256 has {len(message.manifest.sha256)} bytes; it must have 32")
    return str(message.WhichOneof("content")), message.manifest.sha256, message.manifest.total_bytes


def decode_update(
    header: bytes, payload: bytes | memoryview | None, *, limits: Limits = LIMITS, verify: bool = True
) -> Update[np.ndarray]:
    """The update: well-formed, but not yet compared with the model, which is ``check_update``'s part.

    While the payload is still to come (None), the vectors have their dtype and shape but hold no memory, only zeros.
    """
    message, arrays = _open("update", header, payload, limits, verify)
    return _read_update(message.update, arrays, limits)


def decode_measurement(header: bytes, payload: bytes | memoryview = b"", *, limits: Limits = LIMITS) -> Measurement:
    """The measurement; its payload is empty."""
    message, arrays = _open("measurement", header, payload, limits, True)
    return _read_measurement(message.measurement, arrays, limits)


def decode_envelope(
    header: bytes, payload: bytes | memoryview | None, *, limits: Limits = LIMITS, verify: bool = True
) -> Envelope:
    """The envelope, whose content is a view on the payload; zeros while that is still to come (None)."""
    message, arrays = _open("envelope", header, payload, limits, verify)
    return _read_envelope(message.envelope, arrays, limits)


def readdressed(header: bytes, round: int, settings: Mapping[str, Setting], *, limits: Limits = LIMITS) -> bytes:
    """The header of an envelope with the same content and other settings: the payload is not needed for it."""
    message = _parse(header, "header of the envelope", limits)
    message.envelope.CopyFrom(wire.Envelope(round=round, settings=write_settings(settings)))
    data = message.SerializeToString()
    at_most(limits.header, len(data), "bytes in the header")
    return data


def decode_failure(header: bytes, payload: bytes | memoryview = b"", *, limits: Limits = LIMITS) -> Failure:
    """The failure; its payload is empty."""
    message, arrays = _open("failure", header, payload, limits, True)
    return _read_failure(message.failure, arrays)


def _parse(header: bytes, what: str, limits: Limits) -> wire.Header:
    at_most(limits.header, len(header), "bytes in the header")
    try:
        return wire.Header.FromString(header)
    except (DecodeError, ValueError) as error:  # a ValueError where protobuf runs without its C library
        raise CodecError(f"the {what} is damaged ({error}); send it again") from error


def _open(
    content: str, header: bytes, payload: bytes | memoryview | None, limits: Limits, verify: bool
) -> tuple[wire.Header, Arrays]:
    message = _parse(header, f"header of the {content}", limits)
    found = message.WhichOneof("content")
    if found != content:
        raise CodecError(f"expected a header with {content}, got {found}; run the same version of Shoal on both sides")
    if payload is None:
        check_manifest(message.manifest, message.manifest.total_bytes, limits)
        return message, hollow(message.manifest)
    data = memoryview(payload)
    check_manifest(message.manifest, data.nbytes, limits)
    if verify and hashlib.sha256(data).digest() != message.manifest.sha256:
        raise CodecError(f"the payload of the {content} is damaged: its SHA-256 differs; send it again")
    return message, views(message.manifest, data)


def _write(value: Value) -> tuple[wire.Header, Arrays]:
    if isinstance(value, Failure):
        failure = wire.Failure(client=value.client, round=value.round, reason=value.reason, traceback=value.traceback)
        return wire.Header(failure=failure), {}
    if isinstance(value, Measurement):
        return wire.Header(measurement=wire.Measurement(metrics=write_metrics(value.metrics))), {}
    if isinstance(value, Envelope):
        envelope = wire.Envelope(round=value.round, settings=write_settings(value.settings))
        return wire.Header(envelope=envelope), {("content", "content"): value.content}
    if isinstance(value, Task):
        header, vectors = wire.Header(task=_write_task(value)), {role: getattr(value.model, role) for role in MODEL}
    else:
        header = wire.Header(update=_write_update(value))
        vectors = {"delta": value.delta, "buffers": value.buffers, "counters": value.counters}
    arrays = {(role, role): vector for role, vector in vectors.items() if vector is not None}
    arrays |= {(TENSOR, name): tensor for name, tensor in value.tensors.items()}
    for (_, name), array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise CodecError(f"tensor {quote(name)} is a {type(array).__name__}; convert it to a numpy array")
    return header, arrays


def _read(header: wire.Header, arrays: Arrays, limits: Limits) -> Value:
    if header.HasField("task"):
        return _read_task(header.task, arrays, limits)
    if header.HasField("update"):
        return _read_update(header.update, arrays, limits)
    if header.HasField("measurement"):
        return _read_measurement(header.measurement, arrays, limits)
    if header.HasField("envelope"):
        return _read_envelope(header.envelope, arrays, limits)
    return _read_failure(header.failure, arrays)


def _write_task(task: Task[np.ndarray]) -> wire.Task:
    layout = task.model.layout
    return wire.Task(
        kind=task.kind,
        round=task.round,
        version=task.version,
        layout=[wire.Entry(name=e.name, segment=e.segment, dtype=e.dtype, shape=e.shape) for e in layout.entries],
        layout_hash=layout.hash,
        frozen_hash=frozen_hash(task.model.frozen),
        settings=write_settings(task.settings),
        reply=None if task.reply is None else _write_reply(task.reply),
    )


def _read_task(task: wire.Task, arrays: Arrays, limits: Limits) -> Task[np.ndarray]:
    layout = _read_layout(task, limits)
    vectors, tensors = _split(arrays, "task", MODEL)
    _check_model(vectors, layout)
    return Task(
        _member(Kind, task.kind, "the task's kind"),
        task.round,
        task.version,
        Parameters(layout, vectors["trainable"], vectors["buffers"], vectors["counters"]),
        tensors,
        read_settings(task.settings, limits),
        _read_reply(task.reply, limits) if task.HasField("reply") else None,
    )


def _read_layout(task: wire.Task, limits: Limits) -> Layout:
    at_most(limits.tensors, len(task.layout), "tensors in the layout")
    check_names((e.name for e in task.layout), "layout tensor", limits)
    entries = []
    for e in task.layout:
        what = f"layout tensor {quote(e.name)}"
        segment = _member(Segment, e.segment, f"the segment of {what}")
        entries.append(Entry(e.name, segment, known_dtype(e.dtype, what), shape_of(e.shape, what)))
    layout = Layout(tuple(entries))
    if layout.hash != task.layout_hash:
        raise CodecError("the layout's hash does not fit its tensors; run the same version of Shoal on both sides")
    frozen = len(layout.of(Segment.FROZEN))
    if not re.fullmatch("[0-9a-f]{64}" if frozen else "", task.frozen_hash):
        raise CodecError(
            f"the layout has {frozen} frozen tensors, but the hash of their values is {quote(task.frozen_hash)}; "
            f"encode the task with the values of all of them"
        )
    return layout


def _check_model(vectors: dict[str, np.ndarray], layout: Layout) -> None:
    try:
        dtypes = (layout.dtype, layout.dtype, "int64")
    except InvalidUpdate as error:
        raise CodecError(str(error)) from error
    for role, dtype in zip(MODEL, dtypes, strict=True):
        vector, size = vectors[role], layout.size(Segment(role))
        found = ON_WIRE[vector.dtype.name]
        if (found, vector.shape) != (dtype, (size,)):
            raise CodecError(
                f"the model's {role} are {found}{list(vector.shape)}, its layout says {dtype}[{size}]; "
                f"build the vectors from the layout"
            )


def _write_reply(reply: Mapping[str, Spec]) -> wire.Reply:
    return wire.Reply(
        tensors=[
            wire.Spec(name=name, dtype=wire_dtype(spec.dtype, f"reply tensor {quote(name)}"), shape=spec.shape)
            for name, spec in reply.items()
        ]
    )


def _read_reply(reply: wire.Reply, limits: Limits) -> dict[str, Spec]:
    at_most(limits.tensors, len(reply.tensors), "tensors in the reply")
    check_names((s.name for s in reply.tensors), "reply tensor", limits)
    specs = {}
    for s in reply.tensors:
        what = f"reply tensor {quote(s.name)}"
        specs[s.name] = Spec(DTYPES[known_dtype(s.dtype, what)].name, shape_of(s.shape, what))
    return specs


def _write_update(update: Update[np.ndarray]) -> wire.Update:
    return wire.Update(
        examples=write_number(update.examples, "examples"),
        steps=write_number(update.steps, "steps"),
        lr_sum=write_number(update.lr_sum, "lr_sum"),
        metrics=write_metrics(update.metrics),
    )


def _read_update(update: wire.Update, arrays: Arrays, limits: Limits) -> Update[np.ndarray]:
    vectors, tensors = _split(arrays, "update", ("delta",), ("buffers", "counters"))
    return Update(
        vectors["delta"],
        read_number(update.examples, "examples"),
        read_number(update.steps, "steps"),
        read_number(update.lr_sum, "lr_sum"),
        tensors,
        vectors.get("buffers"),
        vectors.get("counters"),
        read_metrics(update.metrics, limits),
    )


def _read_measurement(measurement: wire.Measurement, arrays: Arrays, limits: Limits) -> Measurement:
    _without_tensors(arrays, "measurement")
    return Measurement(read_metrics(measurement.metrics, limits))


def _read_envelope(envelope: wire.Envelope, arrays: Arrays, limits: Limits) -> Envelope:
    vectors, tensors = _split(arrays, "envelope", ("content",))
    _without_tensors({(TENSOR, name): tensor for name, tensor in tensors.items()}, "envelope")
    content = vectors["content"]
    if content.dtype != np.uint8 or content.ndim != 1:
        raise CodecError(f"the envelope's content is {content.dtype}{list(content.shape)}; it must be bytes: uint8[n]")
    return Envelope(envelope.round, content, read_settings(envelope.settings, limits))


def _without_tensors(arrays: Arrays, what: str) -> None:
    if arrays:
        raise CodecError(f"the {what} brings tensor {quote(next(iter(arrays))[1])}; a {what} has none")


def _read_failure(failure: wire.Failure, arrays: Arrays) -> Failure:
    _without_tensors(arrays, "failure")
    return Failure(failure.client, failure.round, failure.reason, failure.traceback)


def _split(
    arrays: Arrays, what: str, needed: Sequence[str], allowed: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    vectors = {role: array for (role, _), array in arrays.items() if role != TENSOR}
    if not set(needed) <= vectors.keys() <= {*needed, *allowed}:
        found = ", ".join(map(quote, vectors)) or "none"
        raise CodecError(f"the {what} has the vectors {found}; it needs {', '.join(needed)}")
    return vectors, {name: array for (role, name), array in arrays.items() if role == TENSOR}


def _member(kind: type[E], text: str, what: str) -> E:
    try:
        return kind(text)
    except ValueError:
        raise CodecError(f"{what} is {quote(text)}; this version knows {', '.join(kind)}") from None
