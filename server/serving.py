"""The server's network side: an event loop in a thread of its own, so that summing never stops the heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
from grpc import aio

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.messages import NOTHING
from shoal.protos.transport import SERVER, Address, Certificates
from shoal.server.admission import Admit, without_an_app
from shoal.server.board import Board
from shoal.server.health import Health
from shoal.server.hub import Hub
from shoal.server.orders import Event, News
from shoal.server.service import board_handlers, handlers

__all__ = ["Serving"]

T = TypeVar("T")
TICK = 0.25  # seconds between two looks at leases and deadlines
PARTING = 2.0  # seconds for clients to hear the goodbye
GRPC = "grpc._cython.cygrpc"  # logs what gRPC catches around our handlers


class Serving:
    """Listens from the moment it is made until :meth:`close`. :attr:`events` is all that comes back.

    ``service`` answers the calls, ``admit`` denies those who must not come in, names belong to their ``owners``.
    :attr:`watchers` hear all news, on the loop; the :attr:`board` is the first of them.
    ConnectionRefused if the address cannot be had.
    """

    def __init__(
        self,
        address: Address,
        certificates: Certificates | None,
        *,
        heartbeat: float = 30.0,
        service: Callable[[Hub], grpc.GenericRpcHandler] = handlers,
        admit: Admit = without_an_app,
        owners: Mapping[str, str] = NOTHING,
    ) -> None:
        self.address, self._certificates, self._service = address, certificates, service
        _check_free(address)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.hub = Hub(self._spread, heartbeat, admit, owners)
        self.board = Board(self.hub)
        self.watchers: list[Callable[[News], None]] = [self.board.hear]
        self._goodbye = (wire.Goodbye.COME_BACK, "the server stops")
        started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), name="shoal-grpc", daemon=True)
        self._thread.start()
        try:
            self.address = Address(address.host, started.result())
        except BaseException:
            self._thread.join()
            raise

    async def _main(self, started: Future[int]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = aio.server(options=SERVER)
        logging.getLogger(GRPC).addFilter(_is_ours)  # a filter that is there already is not added again
        self._health = Health()
        server.add_generic_rpc_handlers((self._service(self.hub), board_handlers(self.board)))
        self._health.add_to(server)
        try:
            if self._certificates is None:
                port = server.add_insecure_port(str(self.address))
            else:
                port = server.add_secure_port(str(self.address), self._certificates.for_server())
            await server.start()
        except Exception as error:
            started.set_exception(ConnectionRefused(f"cannot listen on {self.address}: {error}"))
            return
        started.set_result(port)
        ticking = asyncio.create_task(self._tick())
        await self._stop.wait()
        ticking.cancel()
        self._drain()
        self._health.close()
        advice, reason = self._goodbye
        self.hub.close(reason, advice)
        await server.stop(PARTING)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.hub.tick()

    def _spread(self, news: News) -> None:
        """To the coordinator what it waits for, to the watchers everything; one that fails harms nobody else."""
        if isinstance(news, Event):
            self.events.put(news)
        for watch in self.watchers:
            try:
                watch(news)
            except Exception:
                logging.getLogger("shoal").exception("a watcher of the server has failed")

    def tell(self, news: News) -> None:
        """What the coordinator has to say to the watchers; from any thread, and returns at once."""
        self._soon(self._spread, news)

    def drain(self) -> None:
        """Show that the server is about to stop; from any thread, and from a signal's handler."""
        self._soon(self._drain)

    def _drain(self) -> None:
        self.board.draining = True
        self._health.drain()

    def _soon(self, function: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def call(self, function: Callable[..., T], *arguments: Any, timeout: float | None = None) -> T:
        """Run a function of the hub on its loop, from any other thread; TimeoutError if that takes too long."""

        async def run() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout)

    def close(self, finished: bool = False) -> None:
        """Say goodbye and stop; may be called twice."""
        if finished:
            self._goodbye = (wire.Goodbye.FINISHED, "all runs are finished")
        self._soon(self._stop.set)
        self._thread.join()


def _is_ours(record: logging.LogRecord) -> bool:
    """Not if a client hung up just as its call was begun or ended here: it left, and that it did the hub has told."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, aio.InternalError | asyncio.CancelledError)


def _check_free(address: Address) -> None:
    """gRPC says only that it failed to bind; the system says why."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectionRefused(f"there is no host {address.host!r} to listen on ({reason})") from error
    tried = [_try_to_bind(family, place) for family, _, _, _, place in found]
    errors = [error for error in tried if error is not None]
    in_use = [error for error in errors if error.errno == errno.EADDRINUSE]
    if in_use or len(errors) == len(found):  # localhost may have two places, of which one is not to be had here
        first = (in_use or errors)[0]
        raise ConnectionRefused(
            f"cannot listen on {address} ({first.strerror}); choose another address with --listen, or stop the "
            f"program that uses it"
        ) from first


def _try_to_bind(family: int, place: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error
    return None
