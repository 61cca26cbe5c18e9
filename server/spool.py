"""Answers on their way in: bytes on disk, so that memory does not grow with the number of clients."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.transport import check_chunk

__all__ = ["Incoming"]


class Incoming:
    """One answer's payload, as far as it has come."""

    def __init__(self, path: Path, header: bytes, sha256: bytes, total: int) -> None:
        self.path, self.header, self.total, self.offset = path, header, total, 0
        self._sha256, self._digest = sha256, hashlib.sha256()
        self._file = path.open("wb")
        self._turn = asyncio.Lock()  # an old connection may still be sending when the new one goes on

    async def append(self, chunk: wire.Chunk) -> int:
        """The new offset; CodecError, and nothing taken, for a chunk that is damaged or not the next one."""
        async with self._turn:
            check_chunk(chunk, self.offset, self.total)
            await asyncio.to_thread(self._write, chunk.data)
            self.offset += len(chunk.data)
        return self.offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def complete(self) -> None:
        """Close the file; CodecError if bytes are missing or are not those that were announced."""
        if self.offset != self.total:
            raise CodecError(f"{self.offset} of {self.total} bytes are here; send the others first")
        self._file.close()
        if self._digest.digest() != self._sha256:
            raise CodecError("the payload is not the one that was announced: its SHA-256 differs; send it again")

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
