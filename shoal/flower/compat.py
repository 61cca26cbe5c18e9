"""What flwr does not promise to keep: names that have moved between its versions, and state of its processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

__all__ = [
    "APP_RAISED",
    "CRASHED",
    "SERVER",
    "context",
    "empty_run",
    "from_wire",
    "identify",
    "logging_to",
    "message_from",
    "metadata_from_wire",
    "metadata_to_wire",
    "name_message",
    "to_wire",
]

SERVER = 1  # the node id of the server, SUPERLINK_NODE_ID
APP_RAISED, CRASHED = 2, 8  # flwr.common.constant.ErrorCode


def _first(*homes: str) -> Any:
    """The first of these ``module:name`` that there is; None if there is none."""
    for home in homes:
        module, name = home.split(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


_Run = _first("flwr.supercore.run:Run", "flwr.common.typing:Run")
_Identity = _first("flwr.supercore.task_identity:TaskIdentity")


def identify(run_id: int) -> None:
    """Say in whose run this process makes messages, where flwr wants to know (from 1.37 or so on)."""
    if _Identity is not None:
        _Identity.run_id, _Identity.task_id, _Identity.node_id = run_id, 1, SERVER


def empty_run(run_id: int, name: str, version: str) -> Any:
    """A ``Run``, which a Grid must have: nobody reads more of it than these."""
    run = _Run.create_empty(run_id)
    run.fab_id, run.fab_version = name, version
    if hasattr(run, "primary_task_id"):
        run.primary_task_id = 1
    return run


def context(run_id: int, node_id: int, node_config: dict[str, Any], run_config: dict[str, Any]) -> Context:
    """A Context with no state yet."""
    return Context(run_id=run_id, node_id=node_id, node_config=node_config, state=RecordDict(), run_config=run_config)


def name_message(message: Message, name: str) -> None:
    """Give a message its id, for which flwr has no setter."""
    message.metadata.__dict__["_message_id"] = name


def message_from(metadata: Any, *, content: RecordDict | None = None, error: Error | None = None) -> Message:
    """A message that is put together again from its parts."""
    made: Message = Message(metadata=metadata, content=content, error=error)  # type: ignore[call-overload]
    return made


def to_wire(content: RecordDict) -> bytes:
    """Records in flwr's own protobuf form."""
    return bytes(_serde("recorddict_to_proto")(content).SerializeToString())


def from_wire(data: bytes) -> RecordDict:
    """The inverse of :func:`to_wire`; what it raises for bytes that are none is of many kinds."""
    found: RecordDict = _serde("recorddict_from_proto")(_proto("recorddict_pb2:RecordDict").FromString(data))
    return found


def metadata_to_wire(metadata: Any) -> bytes:
    """A message's metadata likewise."""
    proto = _serde("message_to_proto")(message_from(metadata, content=RecordDict()))
    return bytes(proto.metadata.SerializeToString())


def metadata_from_wire(data: bytes) -> Any:
    """The inverse of :func:`metadata_to_wire`."""
    proto = _proto("message_pb2:Message")(content=_proto("recorddict_pb2:RecordDict")())
    proto.metadata.MergeFromString(data)
    return _serde("message_from_proto")(proto).metadata


def _serde(function: str) -> Any:
    return _first(f"flwr.common.serde:{function}")


def _proto(message: str) -> Any:
    return _first(f"flwr.proto.{message}")


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """What flwr logs goes to ``handler`` alone."""
    logger = logging.getLogger("flwr")
    before, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate
