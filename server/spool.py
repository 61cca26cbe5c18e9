"""Answers on their way in: bytes on disk, so that memory does not grow with the number of clients."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from pathlib import Path

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.transport import check_chunk

__all__ = ["Incoming"]


class Incoming:
    """One answer's payload, as far as it has come, in a new file of ``folder``.

    The file is open only while a chunk is written: a thousand clients on their way need no thousand descriptors.
    """

    def __init__(self, folder: Path, header: bytes, sha256: bytes, total: int) -> None:
        self.path = folder / f"{secrets.token_hex(8)}.payload"
        self.header, self.total, self.offset = header, total, 0
        self._sha256, self._digest = sha256, hashlib.sha256()
        self.path.touch(exist_ok=False)
        self._turn = asyncio.Lock()  # an old connection may still be sending when the new one goes on

    async def append(self, chunk: wire.Chunk) -> int:
        """The new offset; CodecError, and nothing taken, for a chunk that is damaged or not the next one."""
        # A task of its own: a caller that hangs up must not leave the chunk half taken.
        return await asyncio.shield(self._append(chunk))

    async def _append(self, chunk: wire.Chunk) -> int:
        async with self._turn:
            check_chunk(chunk, self.offset, self.total)
            await asyncio.to_thread(self._write, chunk.data)
            self.offset += len(chunk.data)
            return self.offset

    def _write(self, data: bytes) -> None:
        try:
            with self.path.open("r+b") as file:
                file.seek(self.offset)  # and not the end, where a full disk may have left a part of the chunk
                file.write(data)
        except FileNotFoundError as error:
            raise CodecError("this answer is not wanted any more, or was begun anew; call Begin") from error
        self._digest.update(data)

    def complete(self) -> None:
        """CodecError if bytes are missing or are not those that were announced."""
        if self.offset != self.total:
            raise CodecError(f"{self.offset} of {self.total} bytes are here; send the others first")
        if self._digest.digest() != self._sha256:
            raise CodecError("the payload is not the one that was announced: its SHA-256 differs")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
