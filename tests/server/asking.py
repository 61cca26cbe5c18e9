"""Orders given to a server's hub by hand, with a journal for each server, and what clients answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import numpy as np
import pytest

from shoal.protos.codec import encode
from shoal.protos.messages import Kind, Update
from shoal.protos.transport import CHUNK
from shoal.server.journal import Journal
from shoal.server.orders import Blob, Call, Order
from shoal.server.serving import Serving

__all__ = [
    "BIG",
    "Status",
    "Wait",
    "an_order",
    "an_update",
    "ask",
    "call",
    "journal_of",
    "keep",
    "packed",
    "refused",
    "slowly",
]

Status = grpc.StatusCode
Wait = Callable[[Serving, type[Any]], Any]
WAIT = 10.0  # seconds for what comes within milliseconds
JOURNALS: WeakKeyDictionary[Serving, Journal] = WeakKeyDictionary()
ROUNDS = count(1)  # of the journal: each order is a new one


def keep(serving: Serving, folder: Path) -> Serving:
    """The server, whose orders are kept in the folder."""
    JOURNALS[serving] = Journal(folder)
    return serving


def journal_of(serving: Serving) -> Journal:
    return JOURNALS[serving]


def call(serving: Serving, order: Order, counted: Mapping[str, int]) -> dict[str, str]:
    """Ask the clients; their nonces."""
    clients = list(counted)
    assert isinstance(order.journal, Journal)
    asked = order.journal.open(next(ROUNDS), Kind.TRAIN, clients, len(clients))
    nonces = dict(zip(clients, asked.nonces, strict=True))
    serving.call(serving.hub.ask, order, [Call(nonces[client], client, counted[client]) for client in clients])
    return nonces


def an_update(size: int = 3, value: float = 1.0) -> Update[np.ndarray]:
    return Update(np.full(size, value), 1)


def packed(size: int = 3, value: float = 1.0) -> tuple[bytes, bytes]:
    header, buffers = encode(an_update(size, value))
    return header, b"".join(buffers)


BIG = packed(5 * CHUNK // 16)  # two and a half chunks


def an_order(serving: Serving, **changes: Any) -> Order:
    """An order that takes whatever comes."""
    fields: dict[str, Any] = {
        "run": "run",
        "round": 1,
        "assignment": Blob.of(b"what to do"),
        "header": b"a task",
        "payload": Blob.of(bytes(2 * CHUNK + 5)),
        "check": lambda client, content, header, payload: None,
        "journal": journal_of(serving),
        "lease": 60.0,
    }
    return Order(**(fields | changes))


def ask(serving: Serving, *clients: str, **changes: Any) -> Order:
    """Ask the clients, client "a" if none is named."""
    order = an_order(serving, **changes)
    call(serving, order, dict.fromkeys(clients or ("a",), 0))
    return order


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """How a call ended that must not have succeeded."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def slowly(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, threading.Event]:
    """Let a function wait: an event that says that it was called, and one that lets it go on."""
    called, go = threading.Event(), threading.Event()
    module, _, method = name.rpartition(".")
    owner = _find(module)
    original = getattr(owner, method)

    def slow(*arguments: Any) -> Any:
        called.set()
        assert go.wait(WAIT)
        return original(*arguments)

    monkeypatch.setattr(owner, method, slow)
    return called, go


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)
