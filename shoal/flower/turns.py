"""One message played by a ClientApp, alike in this process and in a worker.

Whatever the app does, there is an answer: a reply that a strategy can take, or an error with the app's traceback.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from shoal.flower.arrays import bytes_of, view
from shoal.flower.compat import APP_RAISED, message_from

__all__ = ["Answer", "Turn", "copied", "failed", "play", "wrong_with"]


@dataclass(frozen=True)
class Turn:
    """What one node is asked: the message without its content, the node's context, a seed for what the app draws.

    ``round`` is the one that the message belongs to, for people.
    """

    metadata: Any
    context: Context
    seed: int
    round: int = 0


@dataclass(frozen=True)
class Answer:
    """A node's reply and its state afterwards; ``reason`` says what went wrong, if something did.

    Of a node that failed the state is that from before.
    """

    reply: Message
    state: RecordDict | None = None
    reason: str = ""
    traceback: str = ""


def play(app: ClientApp, turn: Turn, content: RecordDict) -> Answer:
    """Let the app answer; ``content`` and the node's state are this call's own. What it does to its configs is lost."""
    message, given = message_from(turn.metadata, content=content), turn.context
    context = replace(given, node_config=dict(given.node_config), run_config=dict(given.run_config))
    try:
        reply = app(message, context)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: an app must not end the process that plays others
        shown = "".join(traceback.format_exception(error))
        return failed(message, f"{type(error)}:<'{error}'>", f"{type(error).__name__}: {error}", shown)
    wrong = wrong_with(reply, message) or (
        "the ClientApp changed the run config" if context.run_config != given.run_config else ""
    )
    if wrong:
        return failed(message, wrong, wrong)
    told = f"answered with an error: {reply.error.reason}" if reply.has_error() else ""
    return Answer(reply, context.state, told)


def failed(message: Message, told: str, reason: str, shown: str = "", code: int = APP_RAISED) -> Answer:
    """The answer of a node that has none: its strategy is ``told`` an error, in Flower's form."""
    return Answer(Message(Error(code=code, reason=told), reply_to=message), None, reason, shown)


def wrong_with(reply: object, message: Message) -> str:
    """Why a reply must not reach the strategy; empty if it may."""
    if not isinstance(reply, Message):
        return f"the ClientApp returned a {type(reply).__name__}, not a Message"
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        return "the ClientApp returned a message that is no reply to the one it was sent (reply_to=)"
    if reply.has_error():
        return ""
    if not isinstance(reply.content, RecordDict):
        return f"the ClientApp's reply holds a {type(reply.content).__name__}, not a RecordDict"
    training = message.metadata.message_type.partition(".")[0] == "train"
    for record, arrays in reply.content.items():
        for name, array in arrays.items() if isinstance(arrays, ArrayRecord) else ():
            try:
                value = array.numpy() if (seen := view(array)) is None else seen
            except Exception as error:
                return f"array {name!r} of the reply's {record!r} cannot be read ({error})"
            if training and value.dtype.kind == "f" and not np.isfinite(value).all():
                return f"array {name!r} of the reply's {record!r} is not finite: training diverged; lower its step"
    return ""


def copied(content: RecordDict) -> RecordDict:
    """The same records in containers of their own; arrays, whose bytes nobody can change, are shared."""
    copy = content.copy()
    for name, record in content.items():
        fresh = copy.__dict__["_data"][name] = record.copy()  # what was checked needs no checks
        inside: dict[str, Any] = fresh.__dict__["_data"]
        inside.update({key: list(value) for key, value in inside.items() if isinstance(value, list)})
    return copy


def size(content: RecordDict) -> int:
    """Bytes of the arrays in it."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]  # flwr's own views cost more
    return sum(len(bytes_of(array)) for record in records for array in record.values())


def round_in(content: RecordDict) -> int | None:
    """The round that a message names in its config, as Flower's strategies do."""
    for record in content.values():
        if isinstance(record, ConfigRecord):
            for key in ("server-round", "server_round"):
                found = record.get(key)
                if isinstance(found, int):
                    return found
    return None


def array_record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    """Arrays by name as a record; ``ArrayRecord`` itself takes lists or PyTorch's."""
    from flwr.app import Array

    return ArrayRecord({name: Array(array) for name, array in arrays.items()})
