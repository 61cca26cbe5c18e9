"""Looking at a server from outside: what ``shoal status`` does. Needs no torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from rich.console import Console
from rich.live import Live
from rich.text import Text

from shoal.client.diagnose import diagnose
from shoal.notice import Ticker, notice
from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.fleet_pb2_grpc import BoardStub
from shoal.protos.transport import CHANNEL, Address, Certificates

__all__ = ["Unreachable", "look", "looking", "plain", "watch"]

PATIENCE = 10.0  # seconds for the server to answer
PAUSE = 1.0  # seconds between two looks


class Unreachable(ConnectionRefused):
    """Nobody answers now; that may change."""


Ask = Callable[[], wire.StatusReply]
Seen = wire.StatusReply | Unreachable


def look(address: Address, certificates: Certificates | None, as_json: bool) -> int:
    """Show it once. The exit code: 1 if the disk takes no more. ConnectionRefused if there is nothing to show."""
    with looking(address, certificates) as ask:
        reply = ask()
    if as_json:
        print(json.dumps(plain(reply)))
    else:
        _console().print(notice(reply, str(address)))
    return 1 if reply.disk else 0


def watch(address: Address, certificates: Certificates | None, as_json: bool) -> None:
    """Show it again and again, also when the server goes and comes, until Ctrl-C or until nobody reads it."""
    try:
        with looking(address, certificates) as ask, _showing(address, as_json) as show:
            while True:
                try:
                    show(ask())
                except Unreachable as error:
                    show(error)
                time.sleep(PAUSE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _showing(address: Address, as_json: bool) -> Iterator[Callable[[Seen], None]]:
    """How it is shown: a JSON line each time; in place on a terminal; elsewhere a line for what has changed."""
    console, ticker = _console(), Ticker()

    def as_line(seen: Seen) -> None:
        print(json.dumps({"unreachable": str(seen)} if isinstance(seen, Unreachable) else plain(seen)), flush=True)

    def in_place(seen: Seen) -> None:
        live.update(Text(str(seen)) if isinstance(seen, Unreachable) else notice(seen, str(address)), refresh=True)

    def what_has_changed(seen: Seen) -> None:
        for line in ticker.lost(str(seen)) if isinstance(seen, Unreachable) else ticker.lines(seen):
            print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)

    if as_json or not console.is_terminal:
        yield as_line if as_json else what_has_changed
        return
    with Live(console=console, auto_refresh=False) as live:
        yield in_place


def _console() -> Console:
    """A table is as wide as it must be where no terminal limits it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=240)


@contextmanager
def looking(address: Address, certificates: Certificates | None) -> Iterator[Ask]:
    """A connection, and the function that asks; it raises ConnectionRefused, of which Unreachable may pass."""
    options = [*CHANNEL, ("grpc.enable_http_proxy", 0 if address.loopback else 1)]
    if certificates is None:
        channel = grpc.insecure_channel(str(address), options=options)
    else:
        channel = grpc.secure_channel(str(address), certificates.for_client(), options=options)
    with channel:
        stub = BoardStub(channel)

        def ask() -> wire.StatusReply:
            try:
                return stub.Status(wire.StatusRequest(), timeout=PATIENCE)
            except grpc.RpcError as error:
                raise _refusal(error, address, certificates) from error

        yield ask


def _refusal(error: Any, address: Address, certificates: Certificates | None) -> ConnectionRefused:
    """What went wrong, and what to do."""
    code, details = error.code(), error.details() or "no reason given"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ConnectionRefused(
            f"what answers at {address} shows no status; correct the address, or upgrade the server"
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        found = diagnose(address, None if certificates is None else certificates.folder)
        return Unreachable(found or f"the server at {address} does not answer ({details}); try again")
    return ConnectionRefused(f"the server at {address} does not show its status ({code.name.lower()}: {details})")


def plain(message: Message) -> dict[str, Any]:
    """As JSON types, every field by its name: numbers stay numbers, and what is absent is null."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [plain(item) if isinstance(item, Message) else item for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return plain(value) if isinstance(value, Message) else value
