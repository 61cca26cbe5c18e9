"""A TCP proxy on the loopback that does to connections what networks do: late, slow, silent, torn and damaged bytes.

The driver holds it in its own event loop and changes :attr:`Proxy.weather` while connections stand. What is drawn
(jitter, the bits that flip, the connection that is cut) comes from the given random stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Proxy", "Way", "Weather"]

PIECE = 2**14  # bytes read at once: small, so that a change of weather takes effect at once
RETRANSMIT = 0.2  # seconds until TCP sends again what was lost, at least; twice as long each time
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST, as a router does that lost its table


class Way(StrEnum):
    """The direction of bytes, seen from the client."""

    UP = "up"
    DOWN = "down"


@dataclass(frozen=True)
class Weather:
    """What happens to bytes in one direction; the default is a good network.

    ``delay`` and ``jitter`` are seconds added to each piece. ``flips`` is the chance of a byte to have one bit turned.
    ``rate`` is bytes a second, as a reader takes them that is slow. ``stalled`` holds bytes back until it ends.
    ``loss`` is the chance of a piece to be lost, which TCP shows as a pause: it comes later, and all behind it wait.
    """

    delay: float = 0.0
    jitter: float = 0.0
    flips: float = 0.0
    rate: float | None = None
    stalled: bool = False
    loss: float = 0.0


FINE = Weather()


@dataclass(eq=False)
class _Pipe:
    """One direction of one connection. ``left`` is how many bytes it still lets through before it is torn."""

    way: Way
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    flip_at: int | None = None
    left: int | None = None
    silent: bool = False


@dataclass(eq=False)
class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    pipes: list[_Pipe] = field(default_factory=list)

    def cut(self) -> None:
        for writer in (self.near, self.far):
            raw = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # it is closed already
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()


class Proxy:
    """Listens on :attr:`port` of the loopback and forwards to ``target``."""

    def __init__(self, target: int, rng: random.Random) -> None:
        self._target, self._rng = target, rng
        self.weather: dict[Way, Weather] = dict.fromkeys(Way, FINE)
        self.refusing = False
        self.port, self.forwarded = 0, dict.fromkeys(Way, 0)
        self._pairs = set[_Pair]()
        self._busy = set[asyncio.Task[None]]()
        self._changed = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        self.cut()
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    # --- what the driver does ----------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def set(self, ways: Weather, *which: Way) -> None:
        """The weather from now on; in both directions if none is named."""
        self.weather |= dict.fromkeys(which or tuple(Way), ways)
        self._changed.set()
        self._changed = asyncio.Event()

    def clear(self) -> None:
        """Good weather: bytes that were held back go on."""
        self.refusing = False
        self.set(FINE)

    def cut(self, count: int | None = None) -> int:
        """Reset all connections, or ``count`` that are drawn; how many there were."""
        drawn = self._drawn(count)
        for pair in drawn:
            pair.cut()
        return len(drawn)

    def silence(self, count: int | None = None) -> int:
        """Half-open TCP: connections stay open, and swallow every byte from now on; how many there were."""
        drawn = self._drawn(count)
        for pipe in (pipe for pair in drawn for pipe in pair.pipes):
            pipe.silent = True
        return len(drawn)

    def tear(self, way: Way, within: int, count: int | None = None) -> None:
        """Reset connections after a drawn number of further bytes, at most ``within``: mostly amid a frame."""
        for pipe in self._pipes(way, count):
            pipe.left = self._rng.randint(1, within)

    def flip(self, way: Way, within: int, count: int | None = None) -> None:
        """Turn one bit of one byte, drawn among the next ``within``."""
        for pipe in self._pipes(way, count):
            pipe.flip_at = self._rng.randrange(within)

    def _drawn(self, count: int | None) -> list[_Pair]:
        there = sorted(self._pairs, key=lambda pair: str(pair.near.get_extra_info("peername")))
        return there if count is None else self._rng.sample(there, min(count, len(there)))

    def _pipes(self, way: Way, count: int | None) -> list[_Pipe]:
        return [pipe for pair in self._drawn(count) for pipe in pair.pipes if pipe.way is way]

    # --- connections -------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:  # the proxy closes: asyncio's own callback would report it as an error
            pass
        finally:
            self._busy.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            if self.refusing:
                raise ConnectionRefusedError
            back, far = await asyncio.open_connection("127.0.0.1", self._target, limit=PIECE)
        except OSError:  # nobody listens: as if one had called the server itself
            _Pair(near, near).cut()
            return
        pair = _Pair(near, far)
        pair.pipes = [_Pipe(Way.UP, reader, far), _Pipe(Way.DOWN, back, near)]
        self._pairs.add(pair)
        try:
            await self._forward_both(pair)
        finally:
            self._pairs.discard(pair)
            pair.cut()

    async def _forward_both(self, pair: _Pair) -> None:
        """Until both directions have ended, or one is torn."""
        tasks = [asyncio.create_task(self._forward(pipe)) for pipe in pair.pipes]
        try:
            await asyncio.gather(*tasks)
            for writer in (pair.near, pair.far):
                writer.close()
                await writer.wait_closed()
        except OSError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, pipe: _Pipe) -> None:
        while data := await pipe.reader.read(PIECE):
            data = await self._through(pipe, data)
            if pipe.left is not None and len(data) >= pipe.left:
                pipe.writer.write(data[: pipe.left])
                with contextlib.suppress(OSError):
                    await pipe.writer.drain()
                raise ConnectionResetError
            pipe.left = None if pipe.left is None else pipe.left - len(data)
            self.forwarded[pipe.way] += len(data)
            pipe.writer.write(data)
            await pipe.writer.drain()
        with contextlib.suppress(OSError):
            pipe.writer.write_eof()

    async def _through(self, pipe: _Pipe, data: bytes) -> bytes:
        """The bytes as they come out at the other side, at the time when they do."""
        if self.weather[pipe.way].delay or self.weather[pipe.way].jitter:
            now = self.weather[pipe.way]
            await asyncio.sleep(now.delay + now.jitter * self._rng.random())
        pause = RETRANSMIT
        while (loss := self.weather[pipe.way].loss) and self._rng.random() < loss:
            await asyncio.sleep(pause)
            pause *= 2
        while self.weather[pipe.way].stalled:
            await self._changed.wait()
        now = self.weather[pipe.way]
        if pipe.silent:
            return b""
        if now.rate is not None:
            await self._slowly(pipe, len(data) / now.rate)
        return self._damaged(pipe, data, now.flips)

    async def _slowly(self, pipe: _Pipe, seconds: float) -> None:
        """That long, or until the weather is another."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _damaged(self, pipe: _Pipe, data: bytes, rate: float) -> bytes:
        places = [place for place in range(len(data)) if self._rng.random() < rate] if rate else []
        if pipe.flip_at is not None:
            if pipe.flip_at < len(data):
                places.append(pipe.flip_at)
                pipe.flip_at = None
            else:
                pipe.flip_at -= len(data)
        if not places:
            return data
        turned = bytearray(data)
        for place in places:
            turned[place] ^= 1 << self._rng.randrange(8)
        return bytes(turned)
