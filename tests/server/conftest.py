"""A real server on the loopback, and clients written by hand against the generated stub."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc
import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import Value, encode
from shoal.protos.fleet_pb2_grpc import FleetStub
from shoal.protos.transport import CHANNEL, CHUNK, Address, Certificates
from shoal.server.orders import Event
from shoal.server.serving import Serving
from tests.server.asking import BIG, ask, journal_of, keep

WAIT = 10.0  # seconds for what comes within milliseconds
E = TypeVar("E")


class Peer:
    """One client: says hello, keeps what it hears, and calls what it is told to."""

    def __init__(self, address: str, client: str, credentials: grpc.ChannelCredentials | None, **hello: Any) -> None:
        self.channel = (
            grpc.insecure_channel(address, options=CHANNEL)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=CHANNEL)
        )
        self.stub, self.client, self.session = FleetStub(self.channel), client, ""
        self._says: queue.SimpleQueue[wire.ConnectRequest | None] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[wire.ConnectReply | grpc.RpcError | None] = queue.SimpleQueue()
        self.say(hello=wire.Hello(**({"versions": [1], "client": client, "instance": "one"} | hello)))
        self._call = self.stub.Connect(iter(self._says.get, None))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for reply in self._call:
                self._heard.put(reply)
            self._heard.put(None)
        except grpc.RpcError as error:
            self._heard.put(error)

    def say(self, **content: Any) -> None:
        self._says.put(wire.ConnectRequest(**content))

    def beat(self, nonce: str = "") -> None:
        """Until the server has heard it."""
        self.say(heartbeat=wire.Heartbeat(nonce=nonce))
        self.hear("heartbeat")

    def hear(self, kind: Literal["welcome", "offer", "withdrawal", "heartbeat", "goodbye"]) -> Any:
        """The next reply of a kind; what the connection ended with is raised."""
        while True:
            reply = self._heard.get(timeout=WAIT)
            if isinstance(reply, grpc.RpcError):
                raise reply
            assert reply is not None, f"the connection ended without {kind}"
            if reply.HasField(kind):
                return getattr(reply, kind)

    def welcome(self) -> wire.Welcome:
        welcome: wire.Welcome = self.hear("welcome")
        self.session = welcome.session
        return welcome

    def download(self, sha256: bytes, offset: int = 0) -> bytes:
        request = wire.DownloadRequest(session=self.session, sha256=sha256, offset=offset)
        return b"".join(chunk.data for chunk in self.stub.Download(request, timeout=WAIT))

    def begin(self, nonce: str, header: bytes) -> int:
        request = wire.BeginRequest(session=self.session, nonce=nonce, header=header)
        return self.stub.Begin(request, timeout=WAIT).offset

    def piece(self, nonce: str, offset: int, data: bytes, crc32: int | None = None) -> wire.UploadRequest:
        chunk = wire.Chunk(offset=offset, data=data, crc32=zlib.crc32(data) if crc32 is None else crc32)
        return wire.UploadRequest(session=self.session, nonce=nonce, chunk=chunk)

    def upload(self, nonce: str, payload: bytes, offset: int = 0) -> int:
        pieces = [self.piece(nonce, at, payload[at : at + CHUNK]) for at in range(offset, len(payload), CHUNK)]
        return self.send(pieces)

    def send(self, pieces: Sequence[wire.UploadRequest]) -> int:
        return self.stub.Upload(iter(pieces), timeout=WAIT).offset

    def commit(self, nonce: str) -> wire.Receipt:
        return self.stub.Commit(wire.CommitRequest(session=self.session, nonce=nonce), timeout=WAIT)

    def answer(self, nonce: str, value: Value) -> wire.Receipt:
        header, buffers = encode(value)
        payload = b"".join(buffers)
        offset = self.begin(nonce, header)
        if offset < len(payload):
            self.upload(nonce, payload, offset)
        return self.commit(nonce)

    def leave(self) -> None:
        """Gone from one moment to the next."""
        self._call.cancel()
        self._thread.join(WAIT)

    def close(self) -> None:
        self._says.put(None)
        self._call.cancel()
        self.channel.close()
        self._thread.join(WAIT)


class Errors(logging.Handler):
    """What gRPC and asyncio complain of: a handler that raised, a task that nobody waited for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        said = self.format(record)
        # gRPC has one poller for all event loops of a process, which may hear of an earlier server's after its end.
        earlier = "PollerCompletionQueue" in said and "Event loop is closed" in said
        if record.name.startswith(("grpc", "asyncio", "shoal")) and not earlier:
            self.said.append(said)


Serve = Callable[..., Serving]
Join = Callable[..., Peer]


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """Nothing may be left in it when a test ends."""
    handler = Errors()
    logging.getLogger().addHandler(handler)
    yield handler.said
    logging.getLogger().removeHandler(handler)

    assert handler.said == []


@pytest.fixture
def serve(tmp_path: Path, errors: list[str]) -> Iterator[Serve]:
    """``serve(address=…, certificates=…, heartbeat=…)``: a server on a free port."""
    open_ = list[Serving]()

    def make(
        address: str = "127.0.0.1:0", certificates: Certificates | None = None, heartbeat: float = 30.0
    ) -> Serving:
        open_.append(Serving(Address.parse(address), certificates, heartbeat=heartbeat))
        return keep(open_[-1], tmp_path / f"round {len(open_)}")

    yield make
    for serving in open_:
        serving.close()
        journal_of(serving).close()


@pytest.fixture
def join(serve: Serve) -> Iterator[Join]:
    """``join(serving, name, …)``: a client that has been welcomed; ``welcome=False``: one that only said hello."""
    open_ = list[Peer]()

    def make(
        serving: Serving,
        client: str = "a",
        credentials: grpc.ChannelCredentials | None = None,
        welcome: bool = True,
        **hello: Any,
    ) -> Peer:
        open_.append(Peer(str(serving.address), client, credentials, **hello))
        if welcome:
            open_[-1].welcome()
        return open_[-1]

    yield make
    for peer in open_:
        peer.close()


@pytest.fixture
def event() -> Callable[[Serving, type[E]], E]:
    """``event(serving, Failed)``: the next event of a kind; others before it are passed over."""

    def wait(serving: Serving, kind: type[E]) -> E:
        while True:
            found: Event = serving.events.get(timeout=WAIT)
            if isinstance(found, kind):
                return found

    return wait


@pytest.fixture
def spool(tmp_path: Path) -> Callable[[], list[str]]:
    """``spool()``: the tasks of which bytes lie on disk although no answer was taken."""

    def look() -> list[str]:
        taken = set[str]()
        for file in tmp_path.glob("round */journal.sqlite"):
            with closing(sqlite3.connect(file)) as journal:
                taken |= {nonce for (nonce,) in journal.execute("SELECT nonce FROM task WHERE taken NOT NULL")}
        return sorted({path.stem for path in tmp_path.glob("round */*.payload")} - taken)

    return look


@pytest.fixture
def begun(serve: Serve, join: Join) -> tuple[Serving, Peer, str]:
    """A client that has announced a large answer."""
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce
    assert peer.begin(nonce, BIG[0]) == 0
    return serving, peer, nonce
