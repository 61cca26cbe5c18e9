"""Tensors on their way: to this client and from it, in chunks, going on where they stopped."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

import grpc
from grpc import aio

from shoal.client.link import Link
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import content_of
from shoal.protos.errors import CodecError, InvalidUpdate
from shoal.protos.files import mapped, sync_file
from shoal.protos.transport import blocks, data_of, upload_request

__all__ = ["Depot", "Over", "deliver"]

KEPT = 4  # contents in the cache: the assignment, this round's and the next one's
PAUSE = 1.0  # seconds before a transfer is tried again on a connection that stands
SHORT = 120.0  # seconds for a call that carries no tensors; the server examines a large answer within
TRIES = 20  # in vain, on a connection that stands
LAST = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED})
BROKEN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.CANCELLED})
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED  # the server's disk: it may have room again in an hour


class Over(Exception):
    """The task needs no answer any more."""


class _Attempts:
    """Whether and when to try again: as long as the connection breaks, or something moves."""

    def __init__(self, link: Link) -> None:
        self._link, self._moved, self._vain = link, -1, 0

    async def again(self, error: aio.AioRpcError | CodecError | asyncio.CancelledError, moved: int) -> None:
        """Wait before the next attempt; ``moved`` bytes are across so far.

        Over if the server wants no more of it, InvalidUpdate if it says no, or has said the same too often.
        """
        code, said = _code(error), error.details() if isinstance(error, aio.AioRpcError) else str(error)
        if code is grpc.StatusCode.NOT_FOUND:
            raise Over(said) from error
        self._vain = 0 if moved > self._moved or code in BROKEN or code is FULL else self._vain + 1
        self._moved = max(moved, self._moved)
        if code in LAST or self._vain >= TRIES:
            raise InvalidUpdate(said or f"the server fails ({code})") from error
        await asyncio.sleep(PAUSE)
        await self._link.session()


def _code(error: aio.AioRpcError | CodecError | asyncio.CancelledError) -> grpc.StatusCode | None:
    """A call on a channel that the link has given up is cancelled; so is one whose task shall end: that goes on."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise error
        return grpc.StatusCode.CANCELLED
    return error.code() if isinstance(error, aio.AioRpcError) else None


class Depot:
    """Content by its SHA-256 in a folder; the clients of one process fetch the same content once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turns = WeakValueDictionary[bytes, asyncio.Lock]()  # as long as somebody fetches: contents are many

    async def fetch(self, link: Link, content: wire.Content) -> Path:
        """The file that holds the content; Over if the server does not offer it any more, InvalidUpdate if it fails."""
        path = self._folder / content.sha256.hex()
        turn = self._turns.setdefault(content.sha256, asyncio.Lock())
        async with turn:
            if not path.is_file():
                part = path.with_suffix(".part")
                try:
                    await self._complete(link, content, part)
                    await asyncio.to_thread(sync_file, part)
                except (Over, InvalidUpdate):
                    part.unlink(missing_ok=True)
                    raise
                part.rename(path)
            path.touch()
            self._prune()
        return path

    async def _complete(self, link: Link, content: wire.Content, part: Path) -> None:
        attempts = _Attempts(link)
        while True:
            try:
                return await self._download(link, content, part)
            except (aio.AioRpcError, CodecError, asyncio.CancelledError) as error:
                await attempts.again(error, part.stat().st_size if part.is_file() else 0)

    async def _download(self, link: Link, content: wire.Content, part: Path) -> None:
        session = await link.session()
        part.touch()
        digest = await asyncio.to_thread(_digest, part)
        with part.open("ab") as file:
            offset = file.tell()
            request = wire.DownloadRequest(session=session, sha256=content.sha256, offset=offset)
            if offset < content.total_bytes:
                async for chunk in link.stub.Download(request):
                    data = data_of(chunk, offset, content.total_bytes)
                    await asyncio.to_thread(_append, file, digest, data)
                    offset += len(data)
        if digest.digest() != content.sha256:
            part.unlink()
            raise CodecError("the bytes from the server are not those that it announced: their SHA-256 differs")

    def _prune(self) -> None:
        """Only the newest stay; a file that a worker has mapped lives on until it lets go."""
        busy = {f"{sha256.hex()}.part" for sha256, turn in self._turns.items() if turn.locked()}
        for suffix in ("", ".part"):
            found = [path for path in self._folder.iterdir() if path.suffix == suffix and path.name not in busy]
            for old in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
                old.unlink(missing_ok=True)


def _append(file: IO[bytes], digest: hashlib._Hash, data: bytes) -> None:
    file.write(data)
    digest.update(data)


async def deliver(link: Link, nonce: str, header: bytes, payload: Path) -> wire.Receipt:
    """The server's receipt for an answer; Over if it wants none any more, InvalidUpdate if it cannot be taken.

    Begin says what has arrived already, so nothing is sent twice however often the connection breaks.
    """
    total, attempts, moved = content_of(header)[2], _Attempts(link), 0
    while True:
        session = await link.session()
        try:
            begun = await link.stub.Begin(wire.BeginRequest(session=session, nonce=nonce, header=header), timeout=SHORT)
            moved = int(begun.offset)
            if moved < total:
                await link.stub.Upload(_pieces(session, nonce, mapped(payload), moved))
            receipt: wire.Receipt = await link.stub.Commit(
                wire.CommitRequest(session=session, nonce=nonce), timeout=SHORT
            )
            return receipt
        except (aio.AioRpcError, asyncio.CancelledError) as error:
            await attempts.again(error, moved)


async def _pieces(session: str, nonce: str, data: memoryview, offset: int) -> AsyncIterator[bytes]:
    for position, block in blocks([data], offset):
        yield upload_request(session, nonce, position, block)


def _digest(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest
