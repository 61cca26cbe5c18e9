"""Clients' own parts against a real server on the loopback, with a network between that can break. Tests may wait."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.client.link import Link
from shoal.protos import fleet_pb2 as wire
from shoal.protos.transport import Address, Certificates
from shoal.server.serving import Serving
from tests.server.asking import journal_of, keep

WAIT = 30.0  # seconds for what comes within moments
PIECE = 2**14


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests that wait have a loop of their own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}), WAIT))
    return True


class Network:
    """Between a client and its server. ``cuts`` says after how many bytes a connection breaks, each time anew."""

    def __init__(self, target: Address, cuts: Iterator[int]) -> None:
        self._target, self._cuts, self._left = target, cuts, next(cuts, -1)
        self.up, self.down, self.broken = 0, 0, 0
        self._open, self._turn, self._threads = set[socket.socket](), threading.Lock(), list[threading.Thread]()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._door.getsockname()[1])
        self._start(self._accept)

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                far = socket.create_connection((self._target.host, self._target.port))
                with self._turn:
                    self._open |= {near, far}
                self._start(self._pump, near, far, "up")
                self._start(self._pump, far, near, "down")

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                if self._breaks(way, len(data)):
                    break
                sink.sendall(data)
        self._shut(source, sink)

    def _breaks(self, way: str, count: int) -> bool:
        with self._turn:
            setattr(self, way, getattr(self, way) + count)
            cut = 0 <= self._left <= count
            self._left = next(self._cuts, -1) if cut else max(self._left - count, -1)
            self.broken += cut
            return cut

    def _shut(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection that stands."""
        with self._turn:
            self.broken += 1
            self._shut(*self._open)

    def close(self) -> None:
        self._shut(self._door)
        self._threads[0].join(WAIT)
        self._shut(*self._open)
        for thread in self._threads:
            thread.join(WAIT)
        for end in {self._door, *self._open}:
            end.close()


class Linked(Link):
    """A link that keeps what it hears and says."""

    def __init__(self, address: Address, certificates: Certificates | None, client: str) -> None:
        self.heard: asyncio.Queue[wire.ConnectReply] = asyncio.Queue()
        self.said: asyncio.Queue[str] = asyncio.Queue()
        super().__init__(address, certificates, client, self.heard.put_nowait, self.said.put_nowait)

    async def offer(self) -> wire.Offer:
        while not (reply := await self.heard.get()).HasField("offer"):
            pass
        return reply.offer

    async def says(self, words: str) -> str:
        """The next sentence that holds these words."""
        while words not in (said := await self.said.get()):
            pass
        return said


Serve = Callable[..., Serving]
Between = Callable[..., Network]
Connect = Callable[..., AbstractAsyncContextManager[Linked]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """``serve(certificates=…, …)``: a server on a free port."""
    open_ = list[Serving]()

    def make(certificates: Certificates | None = None, address: str = "127.0.0.1:0", **settings: Any) -> Serving:
        open_.append(Serving(Address.parse(address), certificates, **settings))
        return keep(open_[-1], tmp_path / f"round {len(open_)}")

    yield make
    for serving in open_:
        serving.close()
        journal_of(serving).close()


@pytest.fixture
def between() -> Iterator[Between]:
    """``between(server, cuts)``: a network in front of an address."""
    open_ = list[Network]()

    def make(target: Address, cuts: Iterable[int] = ()) -> Network:
        open_.append(Network(target, iter(cuts)))
        return open_[-1]

    yield make
    for network in open_:
        network.close()


@pytest.fixture
def connect() -> Connect:
    """``async with connect(address) as link``: a client's connection that is kept up."""

    @asynccontextmanager
    async def make(
        address: Address, client: str = "a", certificates: Certificates | None = None
    ) -> AsyncIterator[Linked]:
        link = Linked(address, certificates, client)
        running = asyncio.create_task(link.run(once=False, patience=None))
        try:
            yield link
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return make
