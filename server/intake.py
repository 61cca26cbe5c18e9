"""The chunks of one upload between the network and the disk: several are written at once, while the next ones come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from shoal.protos import fleet_pb2 as wire
from shoal.server.spool import Incoming

__all__ = ["Intake"]

BATCH = 4  # chunks; what an upload holds in memory is at most a batch that waits and one that is written
PAUSE = 0.05  # seconds after which fewer are written, too


class Intake:
    """``where`` gives the place of the chunks, anew for each batch: it raises when they are not wanted any more.

    Going to a thread and back costs as much as writing a chunk there, and keeps the event loop from reading.
    """

    def __init__(self, where: Callable[[], Incoming]) -> None:
        self._where, self._offset = where, 0
        self._waiting = list[wire.Chunk]()
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def put(self, chunk: wire.Chunk) -> None:
        """Take one more; wait for the batch before if this fills one. Raises what an earlier chunk met with."""
        if self._writing is not None and self._writing.done():
            self._writing.result()
        self._waiting.append(chunk)
        if len(self._waiting) == BATCH:
            await self._written()
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._hurry)

    async def end(self) -> int:
        """When all are written: how many bytes of the answer are here."""
        await self._written()
        self._start()
        await self._written()
        return self._offset

    async def settle(self) -> None:
        """However the upload ends: what has come is written before its room in memory is given away."""
        with contextlib.suppress(Exception):  # put and end have told of it, or nobody is left to hear
            await self.end()

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)

    def _hurry(self) -> None:
        """No batch, but it takes its time: write what there is, unless something is being written."""
        self._timer = None
        if self._writing is not None and not self._writing.done():
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._hurry)
        elif self._writing is None or self._writing.exception() is None:
            self._start()

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            batch, self._waiting = self._waiting, []
            self._writing = asyncio.create_task(self._write(batch))
            self._writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # put or end raises it

    async def _write(self, batch: Sequence[wire.Chunk]) -> None:
        incoming = self._where()
        await incoming.append(batch)
        self._offset = incoming.offset
