"""Target: whatever a client calls, in whatever order, it gets a status with a reason, and the server serves on.

An input is a row of calls: which one, the message's length in two bytes, the message. In messages the bytes SESSION and
NONCE stand for those of a client that has been welcomed and asked. The server is a real one on the loopback.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import decode_update, encode
from shoal.protos.errors import CodecError
from shoal.protos.messages import Update
from shoal.protos.transport import BOARD, SERVICE, Address
from shoal.server.journal import Journal
from shoal.server.orders import Blob, Order
from shoal.server.serving import Serving
from tests.fuzz.mutation import mutated
from tests.server.asking import JOURNALS, call
from tests.server.conftest import Errors, Peer

__all__ = ["mutate", "run", "seeds"]

SESSION, NONCE = b"S" * 32, b"N" * 16
MOST = 8  # calls in a row
WAIT = 10.0
CONTENT = Blob.of(bytes(64))
HEADER, BUFFERS = encode(Update(np.zeros(4), 1))
PAYLOAD = b"".join(BUFFERS)
REQUESTS = (
    *(wire.ConnectRequest, wire.DownloadRequest, wire.UploadRequest),
    *(wire.BeginRequest, wire.CommitRequest, wire.StatusRequest),
)
SAID_NO = {
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND),
    *(grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED),
}


class _Target:
    """One server and one client of it, for all inputs."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Errors()
        logging.getLogger().addHandler(self._errors)
        self._serving = Serving(Address("127.0.0.1", 0), None)
        self._journal = JOURNALS[self._serving] = Journal(Path(self._folder.name), sync=False)
        self._peer = self._join()

    def _join(self) -> Peer:
        peer = Peer(str(self._serving.address), "a", None)
        peer.welcome()
        return peer

    def run(self, data: bytes) -> None:
        if not self._serving.call(lambda: self._peer.session in self._serving.hub._sessions):  # another "a" has joined
            self._peer.close()
            self._peer = self._join()
        order = Order("run", 1, Blob.of(b"{}"), b"a task", CONTENT, _check, self._journal, lease=60.0)
        nonce = call(self._serving, order, {"a": 0})["a"].encode()
        for kind, message in _rows(data):
            self._call(kind, message.replace(SESSION, self._peer.session.encode()).replace(NONCE, nonce))
        self._serving.call(self._serving.hub.end, order, "over")
        self._journal.forget(0)
        for queue in (self._serving.events, self._peer._heard):  # as a coordinator and a client would
            while not queue.empty():
                queue.get_nowait()

        assert not self._serving.call(lambda: self._serving.hub._open)
        assert not self._errors.said, self._errors.said

    def _call(self, kind: int, message: bytes) -> None:
        channel: Any = self._peer.channel
        try:
            match kind % len(REQUESTS):
                case 0:
                    list(channel.stream_stream(f"/{SERVICE}/Connect")(iter([message]), timeout=WAIT))
                case 1:
                    list(channel.unary_stream(f"/{SERVICE}/Download")(message, timeout=WAIT))
                case 2:
                    channel.stream_unary(f"/{SERVICE}/Upload")(iter([message]), timeout=WAIT)
                case 3:
                    channel.unary_unary(f"/{SERVICE}/Begin")(message, timeout=WAIT)
                case 4:
                    channel.unary_unary(f"/{SERVICE}/Commit")(message, timeout=WAIT)
                case 5:
                    channel.unary_unary(f"/{BOARD}/Status")(message, timeout=WAIT)
        except grpc.RpcError as error:
            assert error.code() in SAID_NO and error.details(), error


def _check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
    if content != "update":
        raise CodecError(f"client {client!r} sends {content}, not an update")
    decode_update(header, payload)


def _rows(data: bytes) -> Iterator[tuple[int, bytes]]:
    for _ in range(MOST):
        if len(data) < 3:
            return
        end = 3 + int.from_bytes(data[1:3], "big")
        yield data[0], data[3:end]
        data = data[end:]


@cache
def _target() -> _Target:
    return _Target()


def run(data: bytes) -> None:
    """One input."""
    _target().run(data)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The same row with one call changed, left out, doubled or moved."""
    rows = list(_rows(data))
    if not rows:
        return data
    at = rng.randrange(len(rows))
    kind, message = rows.pop(at)
    if rng.random() < 0.7:
        try:
            request = REQUESTS[kind % len(REQUESTS)].FromString(message)
        except DecodeError:
            return data
        mutated(request, rng)
        rows.insert(at, (kind, request.SerializeToString()))
    else:
        rows[at:at] = rng.choice(([], [(kind, message)] * 2, [(rng.randrange(len(REQUESTS)), message)]))
        rng.shuffle(rows)
    return b"".join(_row(kind, message) for kind, message in rows)


def seeds() -> list[bytes]:
    """Right rows of calls, from which damaged ones are made."""
    session, nonce = SESSION.decode(), NONCE.decode()
    hello = wire.ConnectRequest(hello=wire.Hello(versions=[1], client="b", instance="one"))
    download = wire.DownloadRequest(session=session, sha256=CONTENT.sha256, offset=3)
    begin = wire.BeginRequest(session=session, nonce=nonce, header=HEADER)
    chunk = Peer.piece
    peer = type("Named", (), {"session": session})()
    first, second = chunk(peer, nonce, 0, PAYLOAD[:16]), chunk(peer, nonce, 16, PAYLOAD[16:])
    commit = wire.CommitRequest(session=session, nonce=nonce)
    rows: list[list[tuple[int, Any]]] = [
        [(0, hello)],
        [(5, wire.StatusRequest())],
        [(1, download)],
        [(3, begin), (2, first), (2, second), (4, commit), (4, commit)],
        [(3, begin), (2, first), (3, begin), (2, second), (4, commit)],
        [(4, commit), (2, first), (3, begin), (4, commit)],
    ]
    return [b"".join(_row(kind, message.SerializeToString()) for kind, message in row) for row in rows]


def _row(kind: int, message: bytes) -> bytes:
    return bytes([kind]) + len(message).to_bytes(2, "big") + message
