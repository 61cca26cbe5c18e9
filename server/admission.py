"""What a client says of itself, and what it answers: checked before it is let in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import content_of, decode_failure
from shoal.protos.files import mapped
from shoal.protos.messages import Failure
from shoal.protos.transport import VERSIONS, software
from shoal.server.orders import Assigned, Denied
from shoal.server.spool import Incoming

__all__ = ["Admit", "check_name", "common_version", "examine", "failure_of", "without_an_app"]

Admit = Callable[[wire.Hello, Collection[str]], None]  # who calls, and who is connected: Denied if it may not come in

SENTENCE, LONGEST = 2_000, 20_000  # characters of a reason and of a client's traceback that are kept


def common_version(hello: wire.Hello) -> int:
    """The newest protocol that both speak; Denied if there is none."""
    common = set(hello.versions) & set(VERSIONS)
    if not common:
        older = max(hello.versions, default=0) < min(VERSIONS)
        raise Denied(
            "FAILED_PRECONDITION",
            f"the client ({hello.software or 'unknown'}) speaks protocol {_list(hello.versions)}, this server "
            f"({software()}) speaks {_list(VERSIONS)}; upgrade the {'client' if older else 'server'}",
        )
    return max(common)


def check_name(client: str) -> None:
    """Denied unless people can read it."""
    if not client or len(client) > 200 or not client.isprintable():
        raise Denied("INVALID_ARGUMENT", f"{client[:80]!r} is no client name: 1 to 200 printable characters; set --id")


def without_an_app(hello: wire.Hello, present: Collection[str]) -> None:
    """Denied for a client that brings an app of its own: this server has experiments."""
    if hello.about:
        raise Denied(
            "FAILED_PRECONDITION",
            "this server has experiments of Shoal's and no app of Flower's; connect with 'shoal client'",
        )


def examine(assigned: Assigned, incoming: Incoming) -> Failure | None:
    """In a thread: the whole answer; the client's own failure, or None for one that may be counted."""
    incoming.complete()
    content, _, _ = content_of(incoming.header)
    if content == "failure":
        told = decode_failure(incoming.header)
        return failure_of(assigned, told.reason, told.traceback)
    payload = mapped(incoming.path) if incoming.total else memoryview(b"")
    assigned.order.check(assigned.client, content, incoming.header, payload)
    return None


def failure_of(assigned: Assigned, reason: str, told: str = "", kind: str = "failed") -> Failure:
    """No longer than a line of the log may be, and nothing that moves a terminal's cursor, whatever a client says."""
    said, trace = _shown(reason[:SENTENCE]), _shown(told[-LONGEST:])
    return Failure(assigned.client, assigned.order.round, said, trace, kind)


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def _list(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
