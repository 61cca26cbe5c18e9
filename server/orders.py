"""What the server keeps of its clients: their connections, what they are asked, and what has happened."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ShoalError
from shoal.protos.messages import Failure, Kind
from shoal.server.spool import Incoming

__all__ = [
    "Answered",
    "Asked",
    "Assigned",
    "Blob",
    "Call",
    "Denied",
    "Disk",
    "Event",
    "Failed",
    "Joined",
    "Left",
    "Moved",
    "News",
    "Opened",
    "Order",
    "Over",
    "Recorded",
    "Refused",
    "Repeated",
    "Session",
    "Shelf",
    "Uncounted",
]


class Denied(ShoalError):
    """A call that gets no answer but an error; ``code`` is a gRPC status code's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Answered:
    """A checked answer is in the journal, its payload in a file of it; to check and store it took ``seconds``."""

    nonce: str
    client: str
    header: bytes
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    nonce: str
    failure: Failure


@dataclass(frozen=True)
class Joined:
    client: str
    peer: str
    identity: str = ""


@dataclass(frozen=True)
class Left:
    client: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """One who came under a name that is another's."""

    client: str
    peer: str
    identity: str


Event = Answered | Failed | Joined | Left | Refused


@dataclass(frozen=True)
class Asked:
    """An order is out; calls that are ``taken`` need no answer any more."""

    order: Order
    calls: Sequence[Call]


@dataclass(frozen=True)
class Over:
    """An order has ended; who has not answered it need not any more."""

    order: Order


@dataclass(frozen=True)
class Repeated:
    """An answer that was taken already was committed again."""

    nonce: str


@dataclass(frozen=True)
class Moved:
    """Bytes of tensors and assignments, from clients (``up``) or to them."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True)
class Disk:
    """Why the disk takes no more; None: it does again."""

    refuses: str | None


@dataclass(frozen=True)
class Opened:
    """A run has begun, or goes on after ``round``; its first round waits for ``wanted`` clients."""

    run: str
    folder: str
    rounds: int
    round: int
    wanted: int


@dataclass(frozen=True)
class Recorded:
    """A round stands, with its line of metrics."""

    round: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Uncounted:
    """The coordinator could not count an answer, or hears of a failure."""

    failure: Failure


# What watchers hear beside the events, from the hub or from the coordinator.
News = Event | Asked | Over | Repeated | Moved | Disk | Opened | Recorded | Uncounted


@dataclass(frozen=True)
class Blob:
    """Bytes that clients may fetch: buffers one behind the other."""

    sha256: bytes
    buffers: Sequence[memoryview]

    @classmethod
    def of(cls, data: bytes) -> Blob:
        return cls(hashlib.sha256(data).digest(), [memoryview(data)])

    @property
    def content(self) -> wire.Content:
        return wire.Content(sha256=self.sha256, total_bytes=sum(buffer.nbytes for buffer in self.buffers))


class Shelf(Protocol):
    """Where an order's answers lie; mostly a :class:`~shoal.server.journal.Journal`."""

    def payload(self, nonce: str) -> Path:
        """The file for the bytes of an answer."""
        ...

    def take(self, nonce: str, header: bytes, identity: str) -> None:
        """Keep an answer that is whole and right, given by a client that has proven this identity."""
        ...


@dataclass(frozen=True)
class Order:
    """One ask: what its clients have in common. What a client is asked alone is an order of its own.

    ``check(client, content, header, payload)`` raises for an answer that must not be taken; it is called with None for
    a payload still to come, and not for a failure. The others are kept in the ``journal``. ``ends`` is a time of the
    monotonic clock.
    """

    run: str
    round: int
    assignment: Blob
    header: bytes
    payload: Blob
    check: Callable[[str, str, bytes, memoryview | None], None]
    journal: Shelf
    lease: float
    ends: float | None = None
    kind: Kind = Kind.TRAIN


@dataclass(frozen=True)
class Call:
    """Whom an order asks. ``counted`` is the round in which the client was last counted (of an app: its message).

    ``taken``: its answer is in the journal already, and the client may not know.
    """

    nonce: str
    client: str
    counted: int = 0
    taken: bool = False


@dataclass
class Assigned:
    """One client's part of an order. ``begun``: a heartbeat said that the client is at it."""

    nonce: str
    client: str
    counted: int
    order: Order
    since: float
    begun: bool = False
    incoming: Incoming | None = None
    committing: asyncio.Future[wire.Receipt] | None = None  # from then on nobody else may fail or withdraw it

    def offer(self) -> wire.ConnectReply:
        o = self.order
        offer = wire.Offer(
            nonce=self.nonce,
            lease=o.lease,
            run=o.run,
            assignment=o.assignment.content,
            counted=self.counted,
            header=o.header,
        )
        return wire.ConnectReply(offer=offer)


@dataclass(eq=False)
class Session:
    """One connection of one client, there ``since`` a time of the monotonic clock and last ``seen`` at another."""

    token: str
    client: str
    instance: str
    peer: str
    since: float
    seen: float
    fetched: bytes = b""  # what the client last wanted to have
    outgoing: asyncio.Queue[wire.ConnectReply | None] = field(default_factory=asyncio.Queue)

    def send(self, reply: wire.ConnectReply) -> None:
        self.outgoing.put_nowait(reply)

    def close(self, reason: str, advice: wire.Goodbye.Advice.ValueType) -> None:
        self.send(wire.ConnectReply(goodbye=wire.Goodbye(reason=reason, advice=advice)))
        self.outgoing.put_nowait(None)
