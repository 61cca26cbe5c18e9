"""The chunks of one upload between the network and the disk: several are written at once, while the next ones come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.server.spool import Incoming

__all__ = ["Intake"]

BATCH = 4  # chunks; what an upload holds in memory is at most a batch that waits and one that is written
PAUSE = 0.05  # seconds after which fewer are written, too


class Intake:
    """Chunks of one answer on one connection; ``tell`` hears how many bytes were written.

    Going to a thread and back costs as much as writing a chunk there, and keeps the event loop from reading.
    """

    def __init__(self, tell: Callable[[int], None] = lambda count: None) -> None:
        self._tell, self._offset = tell, 0
        self._incoming: Incoming | None = None
        self._waiting = list[wire.Chunk]()
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def put(self, incoming: Incoming, chunk: wire.Chunk) -> None:
        """Take one more; wait for the batch before if this fills one. Raises what an earlier chunk met with."""
        if self._incoming not in (None, incoming):
            raise CodecError("this answer was begun anew; call Begin")
        self._incoming = incoming
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
        if self._waiting and self._incoming is not None:
            batch, self._waiting = self._waiting, []
            self._writing = asyncio.create_task(self._write(self._incoming, batch))
            self._writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # put or end raises it

    async def _write(self, incoming: Incoming, batch: Sequence[wire.Chunk]) -> None:
        self._tell(await incoming.append(batch))
        self._offset = incoming.offset
