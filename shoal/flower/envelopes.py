"""How messages reach a device that has the ClientApp, and how its answers come back.

A message's content is flwr's own protobuf, in an envelope of Shoal's protocol: nodes that are sent the same content are
sent the same bytes. What is one node's own stands in the envelope's settings, what is the run's in its :class:`Terms`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from numpy.lib import format as npy

from shoal.flower.app import Scalar
from shoal.flower.compat import context, from_wire, message_from, metadata_from_wire, metadata_to_wire, to_wire
from shoal.flower.places import PARTITION
from shoal.flower.turns import Answer, Turn, wrong_with
from shoal.protos.codec import encode, readdressed
from shoal.protos.errors import CodecError, InvalidUpdate
from shoal.protos.messages import Envelope, Setting

__all__ = ["Terms", "answer_in", "asked_in", "counted_in", "envelope_of", "header_for", "packed"]

T = TypeVar("T")
KEPT = "shoal-device"  # the state of a node, here: which of its messages left the one that lies on its device
NUMPY = "numpy.ndarray"


@dataclass(frozen=True)
class Terms:
    """What all messages of a run have in common; its assignment."""

    run: int
    app: str
    nodes: int
    config: Mapping[str, Scalar]

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Terms:
        """CodecError if it is none."""
        try:
            found = json.loads(data)
            terms = cls(found["run"], found["app"], found["nodes"], dict(found["config"]))
        except (ValueError, TypeError, KeyError) as error:
            raise CodecError(f"the run's assignment is not that of a Flower app ({error!r})") from error
        if not all(isinstance(value, Scalar) for value in terms.config.values()):
            raise CodecError("the run config holds more than text, numbers and booleans")
        return terms


# --- on the server ---------------------------------------------------------------------------------------------------


def packed(content: RecordDict) -> tuple[bytes, list[memoryview]]:
    """The header and payload of a message with this content, which is still nobody's."""
    return encode(Envelope(0, np.frombuffer(to_wire(content), np.uint8)))


def header_for(turn: Turn, header: bytes, rank: int) -> bytes:
    """The header of one node's message; ``rank`` is the node's place among all."""
    settings: dict[str, Setting] = {"metadata": metadata_to_wire(turn.metadata), "seed": turn.seed, PARTITION: rank}
    return readdressed(header, turn.round, settings)


def counted_in(state: RecordDict) -> int:
    """Which of a node's messages has left the state that its device has; 0 if none has."""
    return int(str(state[KEPT]["message"])) if KEPT in state else 0


def answer_in(envelope: Envelope, turn: Turn) -> Answer:
    """A device's answer as a reply to the message that it was sent, in whose metadata the device has no say.

    InvalidUpdate if it must not reach the strategy.
    """
    message = message_from(turn.metadata, content=RecordDict())
    state = RecordDict({KEPT: ConfigRecord({"message": 1 + counted_in(turn.context.state)})})
    if "error" in envelope.settings:
        code, reason = _setting(envelope.settings, "error", int), _setting(envelope.settings, "reason", str)
        return Answer(Message(Error(code, reason), reply_to=message), state, f"answered with an error: {reason}")
    reply = Message(_content(envelope), reply_to=message)
    wrong = _claims_too_much(reply) or wrong_with(reply, message)
    if wrong:
        raise InvalidUpdate(wrong)
    return Answer(reply, state)


def _claims_too_much(reply: Message) -> str:
    """An array that says it were larger than it is: it would be given the memory before it is read."""
    for record, arrays in reply.content.array_records.items():
        for name, array in arrays.items():
            if array.stype == NUMPY and not _fits(array.data):
                return f"array {name!r} of the reply's {record!r} is not a whole NumPy array"
    return ""


def _fits(data: bytes) -> bool:
    file = io.BytesIO(data)
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        shape, _, dtype = read(file)
    except Exception:  # a header is Python text, and what it raises of many kinds
        return False
    return not dtype.hasobject and prod(shape) * dtype.itemsize == len(data) - file.tell()


# --- on a device -----------------------------------------------------------------------------------------------------


def asked_in(envelope: Envelope, terms: Terms, own: Mapping[str, Scalar], state: bytes) -> tuple[Turn, RecordDict]:
    """The turn and its content; ``own`` is what the device says of itself, which wins over what the server says."""
    metadata = _metadata(_setting(envelope.settings, "metadata", bytes))
    place: dict[str, Scalar] = {PARTITION: _setting(envelope.settings, PARTITION, int), "num-partitions": terms.nodes}
    about = context(terms.run, metadata.dst_node_id, {**place, **own}, dict(terms.config))
    about.state = from_wire(state)
    return Turn(metadata, about, _setting(envelope.settings, "seed", int), envelope.round), _content(envelope)


def envelope_of(answer: Answer, round: int) -> Envelope:
    """An answer on its way to the server, without the state."""
    if answer.reply.has_error():
        error = answer.reply.error
        settings: dict[str, Setting] = {"error": error.code, "reason": error.reason or ""}
        return Envelope(round, np.empty(0, np.uint8), settings)
    return Envelope(round, np.frombuffer(to_wire(answer.reply.content), np.uint8))


# --- on both ---------------------------------------------------------------------------------------------------------


def _content(envelope: Envelope) -> RecordDict:
    try:
        return from_wire(envelope.content.tobytes())
    except Exception as error:  # flwr and protobuf have many kinds
        raise InvalidUpdate(f"the content is no RecordDict of flwr's ({type(error).__name__}: {error})") from error


def _metadata(data: bytes) -> Any:
    try:
        return metadata_from_wire(data)
    except Exception as error:
        raise CodecError(f"the message's metadata cannot be read ({type(error).__name__}: {error})") from error


def _setting(settings: Mapping[str, Setting], name: str, kind: type[T]) -> T:
    found = settings.get(name)
    if type(found) is not kind:
        raise CodecError(f"the envelope's {name!r} is {found!r:.80}; run the same version of Shoal on both sides")
    return found
