"""Answers on their way in: bytes on disk, so that memory does not grow with the number of clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import shutil
import threading
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.transport import data_of

__all__ = ["Incoming", "Torn"]

GONE = "this answer is not wanted any more, or was begun anew; call Begin"
SPARE = 2**24  # bytes beside the answer itself that must be free on the disk: checkpoint and log need room too


class Torn(CodecError):
    """Bytes that were here before this server was have suffered: they are to be sent again."""


class Incoming:
    """One answer's payload in the file ``path``, as far as it has come; an answer without one needs no file.

    If the same answer was begun before, it goes on where it stopped: what was announced lies beside the payload. The
    file is open only while a chunk is written: a thousand clients on their way need no thousand descriptors.
    """

    def __init__(self, path: Path, header: bytes, sha256: bytes, total: int) -> None:
        self.path, self.header, self.total, self.offset = path, header, total, 0
        self._note = path.with_suffix(".header")
        self._sha256 = sha256
        self._gone = False
        self._opening = threading.Lock()  # for a thread that comes late must not find the file of an answer begun anew
        self._turn = asyncio.Lock()  # an old connection may still be sending when the new one goes on
        self._digest: hashlib._Hash | None = hashlib.sha256()
        if total and self._begun():
            self.offset, self._digest = path.stat().st_size, None
        elif total:
            _check_room(path.parent, total)
            path.write_bytes(b"")
            self._note.write_bytes(header)

    def _begun(self) -> bool:
        found = self._note.is_file() and self.path.is_file() and self._note.read_bytes() == self.header
        return found and 0 < self.path.stat().st_size <= self.total

    async def append(self, chunks: Sequence[wire.Chunk]) -> int:
        """Take chunks in their order, and say how many bytes they had.

        CodecError at the first that is damaged or not the next: none is taken from there on.
        """
        # A task of its own: a caller that hangs up must not leave a chunk half taken.
        return await asyncio.shield(self._append(chunks))

    async def _append(self, chunks: Sequence[wire.Chunk]) -> int:
        async with self._turn:
            before = self.offset
            await asyncio.to_thread(self._write, chunks)
            return self.offset - before

    def _write(self, chunks: Sequence[wire.Chunk]) -> None:
        """In a thread: going there and back costs as much as a chunk, so it is done once for all that wait."""
        try:
            with self._opened() as file:
                file.seek(self.offset)  # and not the end, where a full disk may have left a part of a chunk
                for chunk in chunks:
                    data = data_of(chunk, self.offset, self.total)
                    _write_all(file, data)
                    if self._digest is not None:
                        self._digest.update(data)
                    self.offset += len(data)
        except FileNotFoundError as error:
            raise CodecError(GONE) from error

    def _opened(self) -> FileIO:
        with self._opening:
            if self._gone:  # and the file, if there is one, is another answer's
                raise CodecError(GONE)
            return self.path.open("r+b", buffering=0)

    def complete(self) -> None:
        """CodecError if bytes are missing or are not those that were announced; Torn if they may be sent again."""
        if self.offset != self.total:
            raise CodecError(f"{self.offset} of {self.total} bytes are here; send the others first")
        if self._digest is None:
            with self.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != self._sha256:
                    raise Torn("what was here of the answer is damaged; send it again from its beginning")
        elif self._digest.digest() != self._sha256:
            raise CodecError("the payload is not the one that was announced: its SHA-256 differs")

    def discard(self) -> None:
        with self._opening:
            self._gone = True
            for path in (self._note, self.path):
                with contextlib.suppress(OSError):  # the disk fails: the file goes when the journal forgets its round
                    path.unlink(missing_ok=True)


def _write_all(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _check_room(folder: Path, total: int) -> None:
    """OSError before the disk is so full that nobody can go on."""
    if shutil.disk_usage(folder).free < total + SPARE:
        raise OSError(errno.ENOSPC, f"No space left beside the {SPARE >> 20} MiB that checkpoint and log may need")
