"""Orders given to a server's hub by hand, with a journal for each server."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from weakref import WeakKeyDictionary

from shoal.protos.messages import Kind
from shoal.server.journal import Journal
from shoal.server.orders import Call, Order
from shoal.server.serving import Serving

__all__ = ["call", "journal_of", "keep"]

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
    asked = order.journal.open(next(ROUNDS), Kind.TRAIN, clients, len(clients))
    nonces = dict(zip(clients, asked.nonces, strict=True))
    serving.call(serving.hub.ask, order, [Call(nonces[client], client, counted[client]) for client in clients])
    return nonces
