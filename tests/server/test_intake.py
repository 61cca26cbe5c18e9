"""Chunks between the network and the disk: several at once, bounded, none lost and none taken that is wrong."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.server import intake
from shoal.server.intake import BATCH, Intake
from shoal.server.spool import Incoming

SIZE, COUNT = 100, 11
WHOLE = random.Random(0).randbytes(SIZE * COUNT)


def pieces(first: int = 0) -> list[wire.Chunk]:
    cut = [(at, WHOLE[at : at + SIZE]) for at in range(first * SIZE, len(WHOLE), SIZE)]
    return [wire.Chunk(offset=at, data=data, crc32=zlib.crc32(data)) for at, data in cut]


class Gated(Incoming):
    """Writes when it is let; ``batches`` says how many chunks it was given each time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "a.payload", b"header", hashlib.sha256(WHOLE).digest(), len(WHOLE))
        self.batches, self.go, self.called = list[int](), threading.Event(), asyncio.Event()
        self.go.set()

    async def append(self, chunks: Sequence[wire.Chunk]) -> int:
        self.batches.append(len(chunks))
        self.called.set()
        return await super().append(chunks)

    def _write(self, chunks: Sequence[wire.Chunk]) -> None:
        assert self.go.wait(30)
        super()._write(chunks)


async def _sent(incoming: Incoming, chunks: Sequence[wire.Chunk]) -> int:
    taking = Intake()
    try:
        for chunk in chunks:
            await taking.put(incoming, chunk)
        return await taking.end()
    finally:
        await taking.settle()


def test_chunks_are_written_in_batches_and_all_of_them(tmp_path: Path) -> None:
    async def run() -> Gated:
        incoming = Gated(tmp_path)
        assert await _sent(incoming, pieces()) == len(WHOLE)
        return incoming

    incoming = asyncio.run(run())
    incoming.complete()

    assert incoming.path.read_bytes() == WHOLE
    assert max(incoming.batches) <= BATCH
    assert len(incoming.batches) < COUNT


def test_a_sender_waits_for_the_disk_and_what_waits_for_it_is_bounded(tmp_path: Path) -> None:
    async def run() -> tuple[int, list[int]]:
        incoming, put = Gated(tmp_path), list[int]()
        incoming.go.clear()
        taking = Intake()

        async def send() -> None:
            for number, chunk in enumerate(pieces()):
                await taking.put(incoming, chunk)
                put.append(number)

        sending = asyncio.create_task(send())
        await incoming.called.wait()
        for _ in range(100):  # it goes as far as it can
            await asyncio.sleep(0)
        held = len(put)
        incoming.go.set()
        await sending
        assert await taking.end() == len(WHOLE)
        return held, incoming.batches

    held, batches = asyncio.run(run())

    assert held == 2 * BATCH - 1  # and the one in hand
    assert batches[:2] == [BATCH, BATCH]


@pytest.mark.parametrize("wrong", range(COUNT))
def test_what_is_before_a_damaged_chunk_is_kept_and_nothing_behind_it(tmp_path: Path, wrong: int) -> None:
    async def run() -> Incoming:
        incoming, chunks = Gated(tmp_path), pieces()
        chunks[wrong].crc32 ^= 1
        with pytest.raises(CodecError, match=f"the chunk at byte {wrong * SIZE} is damaged"):
            await _sent(incoming, chunks)
        assert incoming.offset == wrong * SIZE
        assert incoming.path.read_bytes() == WHOLE[: wrong * SIZE]
        assert await _sent(incoming, pieces(wrong)) == len(WHOLE)
        return incoming

    asyncio.run(run()).complete()


def test_one_who_sends_no_more_for_a_moment_has_what_it_sent_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "PAUSE", 0.001)

    async def run() -> None:
        incoming = Gated(tmp_path)
        taking = Intake()
        await taking.put(incoming, pieces()[0])
        await incoming.called.wait()
        await taking.settle()
        assert incoming.offset == SIZE

    asyncio.run(run())


def test_a_call_that_is_cancelled_leaves_what_had_come(tmp_path: Path) -> None:
    async def run() -> int:
        incoming, never = Gated(tmp_path), asyncio.Event()
        taking = Intake()

        async def call() -> None:
            try:
                for chunk in pieces()[:3]:
                    await taking.put(incoming, chunk)
                never.set()
                await asyncio.Event().wait()
            finally:
                await taking.settle()

        calling = asyncio.create_task(call())
        await never.wait()
        calling.cancel()
        await asyncio.wait([calling])
        return incoming.offset

    assert asyncio.run(run()) == 3 * SIZE


def test_chunks_that_are_not_wanted_any_more_are_not_written(tmp_path: Path) -> None:
    """Also where the same answer was begun anew, with another header and a file of the same name."""

    async def run() -> tuple[Gated, Gated]:
        taking, incoming = Intake(), Gated(tmp_path)
        await taking.put(incoming, pieces()[0])
        incoming.discard()
        again = Gated(tmp_path)
        with pytest.raises(CodecError, match="not wanted any more"):
            await taking.end()
        await taking.settle()
        with pytest.raises(CodecError, match="begun anew"):
            await taking.put(again, pieces()[1])
        return incoming, again

    incoming, again = asyncio.run(run())

    assert (incoming.offset, again.offset, again.path.read_bytes()) == (0, 0, b"")


def test_chunks_whose_thread_comes_late_are_not_written_into_an_answer_begun_anew(tmp_path: Path) -> None:
    async def run() -> tuple[Gated, Gated]:
        incoming = Gated(tmp_path)
        incoming.go.clear()
        writing = asyncio.create_task(incoming.append(pieces()))
        await incoming.called.wait()
        await asyncio.sleep(0)  # it is for the thread now
        incoming.discard()
        again = Gated(tmp_path)
        incoming.go.set()
        with pytest.raises(CodecError, match="begun anew"):
            await writing
        return incoming, again

    incoming, again = asyncio.run(run())

    assert (incoming.offset, again.offset, again.path.read_bytes()) == (0, 0, b"")
