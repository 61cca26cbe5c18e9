"""Answers on their way to the server: they are taken whole and once, whoever hangs up, or refused with a reason."""

from __future__ import annotations

import errno
import functools
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import InvalidUpdate
from shoal.protos.messages import Failure
from shoal.protos.transport import CHUNK
from shoal.server.journal import Journal
from shoal.server.orders import Answered, Failed
from shoal.server.serving import Serving
from tests.server.asking import BIG, Status, Wait, an_update, ask, packed, refused, slowly

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

WAIT = 10.0


# --- answers on their way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "data", "crc32"),
    [
        (CHUNK, b"damaged", 7),
        (0, b"again", None),
        (CHUNK + 1, b"a gap", None),
        (CHUNK, bytes(2 * CHUNK), None),
        (CHUNK, b"", None),
        (2**64 - 1, b"far", None),
    ],
)
@pytest.mark.fault(20)
def test_a_wrong_chunk_aborts_and_the_answer_goes_on_from_the_last_right_one(
    begun: tuple[Serving, Peer, str], offset: int, data: bytes, crc32: int | None
) -> None:
    _, peer, nonce = begun
    first = peer.piece(nonce, 0, BIG[1][:CHUNK])
    code, why = refused(lambda: peer.send([first, peer.piece(nonce, offset, data, crc32)]))
    on = peer.begin(nonce, BIG[0])

    assert (code, "chunk" in why, on) == (Status.ABORTED, True, CHUNK)
    assert peer.upload(nonce, BIG[1], on) == len(BIG[1])
    assert peer.commit(nonce).status == wire.Receipt.ACCEPTED


@pytest.mark.fault(20)
@pytest.mark.parametrize("seed", range(5))
def test_chunks_in_any_order_and_over_one_another_end_as_the_answer(
    begun: tuple[Serving, Peer, str], seed: int
) -> None:
    """Swapped, repeated and overlapping, until it is whole: what is taken are the right bytes alone."""
    _, peer, nonce = begun
    draw, sizes = random.Random(seed), (CHUNK // 3, CHUNK // 2, CHUNK)
    pieces = [(at, at + size) for size in sizes for at in range(0, len(BIG[1]), size)]
    draw.shuffle(pieces)
    aborted = 0
    for begin, end in pieces:
        try:
            peer.send([peer.piece(nonce, begin, BIG[1][begin:end])])
        except grpc.RpcError as error:
            assert error.code() is Status.ABORTED
            aborted += 1
    offset = peer.begin(nonce, BIG[0])

    assert aborted > 0
    assert offset == len(BIG[1]) or peer.upload(nonce, BIG[1], offset) == len(BIG[1])
    assert peer.commit(nonce).status == wire.Receipt.ACCEPTED  # by its SHA-256


def test_only_the_first_message_of_an_upload_names_the_task(begun: tuple[Serving, Peer, str]) -> None:
    _, peer, nonce = begun
    pieces = [peer.piece(nonce, at, BIG[1][at : at + CHUNK]) for at in range(0, len(BIG[1]), CHUNK)]
    for later in pieces[1:]:
        later.ClearField("session")
        later.ClearField("nonce")

    assert peer.send(pieces) == len(BIG[1])


def test_another_header_begins_anew(begun: tuple[Serving, Peer, str], spool: Callable[[], list[str]]) -> None:
    _, peer, nonce = begun
    peer.send([peer.piece(nonce, 0, BIG[1][:CHUNK])])
    other = packed(value=2.0)

    assert peer.begin(nonce, other[0]) == 0
    assert len(spool()) == 1
    assert peer.upload(nonce, other[1]) == len(other[1])
    assert peer.commit(nonce).status == wire.Receipt.ACCEPTED


def test_a_commit_before_the_last_byte_says_how_many_are_here(begun: tuple[Serving, Peer, str]) -> None:
    _, peer, nonce = begun
    peer.send([peer.piece(nonce, 0, b"abc")])
    code, why = refused(lambda: peer.commit(nonce))

    assert (code, why) == (Status.FAILED_PRECONDITION, f"3 of {len(BIG[1])} bytes are here; send the rest")


def test_bytes_without_a_begin_are_refused(serve: Serve, join: Join) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce

    assert refused(lambda: peer.upload(nonce, b"abc"))[0] == Status.FAILED_PRECONDITION
    assert refused(lambda: peer.commit(nonce))[0] == Status.FAILED_PRECONDITION


@pytest.mark.fault(6)
def test_an_answer_is_counted_once_however_often_it_is_committed(begun: tuple[Serving, Peer, str], event: Wait) -> None:
    serving, peer, nonce = begun
    peer.upload(nonce, BIG[1])
    statuses = [peer.commit(nonce).status for _ in range(3)]
    event(serving, Answered)

    assert statuses == [wire.Receipt.ACCEPTED, wire.Receipt.DUPLICATE, wire.Receipt.DUPLICATE]
    assert peer.begin(nonce, BIG[0]) == len(BIG[1])
    assert peer.begin(nonce, packed()[0]) == len(BIG[1])
    assert refused(lambda: peer.upload(nonce, b"abc"))[0] == Status.FAILED_PRECONDITION
    assert serving.events.empty()


def test_a_caller_that_hangs_up_in_the_middle_of_a_chunk_leaves_it_whole(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, peer, nonce = begun
    writing, go = slowly(monkeypatch, "shoal.server.spool.Incoming._write")
    call = peer.stub.Upload.future(iter([peer.piece(nonce, 0, BIG[1][:CHUNK])]))
    assert writing.wait(WAIT)
    call.cancel()
    peer.beat()  # the server has heard of it
    go.set()
    with pytest.raises(grpc.RpcError):  # waits for the chunk on its way, and finds it there
        peer.send([peer.piece(nonce, 0, BIG[1][:CHUNK])])

    assert peer.begin(nonce, BIG[0]) == CHUNK
    assert peer.upload(nonce, BIG[1], CHUNK) == len(BIG[1])
    assert peer.commit(nonce).status == wire.Receipt.ACCEPTED


@pytest.mark.fault(6)
def test_a_caller_that_hangs_up_while_its_answer_is_examined_finds_it_taken(
    serve: Serve, join: Join, event: Wait
) -> None:
    serving, examining, go = serve(), threading.Event(), threading.Event()

    def check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
        if payload is not None:
            examining.set()
            assert go.wait(WAIT)

    peer = join(serving)
    ask(serving, check=check)
    nonce, (header, payload) = peer.hear("offer").nonce, packed()
    peer.begin(nonce, header)
    peer.upload(nonce, payload)
    call = peer.stub.Commit.future(wire.CommitRequest(session=peer.session, nonce=nonce))
    assert examining.wait(WAIT)
    call.cancel()
    peer.beat()
    go.set()
    event(serving, Answered)

    assert peer.commit(nonce).status == wire.Receipt.DUPLICATE
    assert serving.events.empty()


@pytest.mark.fault(12)
def test_an_answer_that_is_examined_when_its_round_ends_leaves_nothing(
    serve: Serve, join: Join, spool: Callable[[], list[str]]
) -> None:
    serving, examining, go = serve(), threading.Event(), threading.Event()

    def check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
        if payload is not None:
            examining.set()
            assert go.wait(WAIT)

    peer = join(serving)
    order = ask(serving, check=check)
    nonce, (header, payload) = peer.hear("offer").nonce, packed()
    peer.begin(nonce, header)
    peer.upload(nonce, payload)
    call = peer.stub.Commit.future(wire.CommitRequest(session=peer.session, nonce=nonce))
    assert examining.wait(WAIT)
    serving.call(serving.hub.end, order, "over")
    go.set()

    assert refused(lambda: call.result(WAIT))[0] == Status.NOT_FOUND
    assert spool() == []


def test_an_answer_whose_file_went_with_its_round_is_no_trouble_with_the_disk(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, peer, nonce = begun
    peer.upload(nonce, BIG[1])
    examining, go = slowly(monkeypatch, "shoal.server.hub.examine")
    call = peer.stub.Commit.future(wire.CommitRequest(session=peer.session, nonce=nonce))
    assert examining.wait(WAIT)
    (assigned,) = serving.hub._open.values()
    serving.call(serving.hub.end, assigned.order, "over")
    journal = assigned.order.journal
    assert isinstance(journal, Journal)
    journal.forget(2**31)  # as the next round does
    go.set()

    assert refused(lambda: call.result(WAIT))[0] == Status.NOT_FOUND
    assert serving.call(lambda: serving.board.disk) is None


@pytest.mark.fault(12)
def test_an_upload_whose_round_ends_is_told_so(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch, spool: Callable[[], list[str]]
) -> None:
    serving, peer, nonce = begun
    writing, go = slowly(monkeypatch, "shoal.server.spool.Incoming._write")
    pieces = [peer.piece(nonce, at, BIG[1][at : at + CHUNK]) for at in range(0, len(BIG[1]), CHUNK)]
    call = peer.stub.Upload.future(iter(pieces))
    assert writing.wait(WAIT)
    (assigned,) = serving.hub._open.values()
    serving.call(serving.hub.end, assigned.order, "over")
    go.set()

    assert refused(lambda: call.result(WAIT))[0] in (Status.NOT_FOUND, Status.ABORTED)
    assert spool() == []


@pytest.mark.fault(14)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=os.strerror)
def test_a_disk_that_is_full_or_fails_loses_nothing(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _, peer, nonce = begun
    peer.send([peer.piece(nonce, 0, BIG[1][:CHUNK])])
    with monkeypatch.context() as full:
        full.setattr("shoal.server.spool.Incoming._write", functools.partialmethod(_half, number=number))
        code, why = refused(lambda: peer.upload(nonce, BIG[1], CHUNK))
        assert (code, os.strerror(number) in why) == (Status.RESOURCE_EXHAUSTED, True)

    assert peer.upload(nonce, BIG[1], CHUNK) == len(BIG[1])
    assert peer.commit(nonce).status == wire.Receipt.ACCEPTED


def _half(self: Any, chunks: Sequence[wire.Chunk], number: int) -> None:
    """As a disk that takes a part of the bytes, then fails."""
    data = chunks[0].data
    with self.path.open("r+b") as file:
        file.seek(self.offset)
        file.write(data[: len(data) // 2])
    raise OSError(number, os.strerror(number))


def test_a_file_that_the_disk_does_not_give_back_ends_neither_task_nor_round(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch, event: Wait
) -> None:
    """Who is rejected is told so, and so is the coordinator; the next order is served."""
    serving, peer, nonce = begun
    peer.upload(nonce, BIG[1][:-1] + b"!")
    (assigned,) = serving.hub._open.values()
    with monkeypatch.context() as failing:
        failing.setattr(Path, "unlink", _fail)
        assert peer.commit(nonce).status == wire.Receipt.REJECTED
        assert event(serving, Failed).nonce == nonce
        serving.call(serving.hub.end, assigned.order, "over")
    ask(serving)

    assert peer.answer(peer.hear("offer").nonce, an_update()).status == wire.Receipt.ACCEPTED


@pytest.mark.slow
def test_a_file_that_the_disk_does_not_give_back_stops_no_lease(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch, event: Wait
) -> None:
    serving, _, nonce = begun
    (assigned,) = serving.hub._open.values()
    monkeypatch.setattr(Path, "unlink", _fail)
    assigned.order = replace(assigned.order, lease=0.0)

    assert event(serving, Failed).nonce == nonce
    ask(serving, lease=0.0)
    assert event(serving, Failed).nonce != nonce


def _fail(path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# --- answers that are refused -----------------------------------------------------------------------------------------


@pytest.mark.fault(20)
def test_a_wrong_sha256_is_found_at_the_commit(begun: tuple[Serving, Peer, str], event: Wait) -> None:
    serving, peer, nonce = begun
    peer.upload(nonce, BIG[1][:-1] + b"!")
    receipts = [peer.commit(nonce) for _ in range(2)]
    failed = event(serving, Failed)

    assert {receipt.status for receipt in receipts} == {wire.Receipt.REJECTED}
    assert (failed.nonce, failed.failure.client, failed.failure.kind) == (nonce, "a", "rejected")
    assert "SHA-256" in failed.failure.reason == receipts[0].reason
    assert serving.events.empty()


def test_a_claim_that_is_refused_is_a_failure_at_once(
    serve: Serve, join: Join, event: Wait, spool: Callable[[], list[str]]
) -> None:
    def check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
        raise InvalidUpdate(f"{client} claims too much")

    serving = serve()
    peer = join(serving)
    ask(serving, check=check)
    nonce = peer.hear("offer").nonce

    assert refused(lambda: peer.begin(nonce, packed()[0])) == (Status.INVALID_ARGUMENT, "a claims too much")
    assert event(serving, Failed).failure == Failure("a", 1, "a claims too much", kind="rejected")
    assert peer.hear("withdrawal").nonce == nonce
    assert refused(lambda: peer.begin(nonce, packed()[0]))[0] == Status.NOT_FOUND
    assert spool() == []


@pytest.mark.parametrize("header", [b"", b"\xff", bytes(2**20 + 1)])
def test_a_header_that_is_none_is_refused(serve: Serve, join: Join, event: Wait, header: bytes) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce

    assert refused(lambda: peer.begin(nonce, header))[0] == Status.INVALID_ARGUMENT
    assert event(serving, Failed).failure.client == "a"


def test_a_clients_own_failure_is_told_as_it_told_it(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    told = Failure("somebody else", 9, "it broke" * 1000, "x" * 30_000)

    assert peer.answer(peer.hear("offer").nonce, told).status == wire.Receipt.ACCEPTED
    assert event(serving, Failed).failure == Failure("a", 1, "it broke" * 250, "x" * 20_000)


def test_what_a_client_says_moves_no_terminals_cursor(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    peer.answer(peer.hear("offer").nonce, Failure("a", 1, "a\n\x1b[2Jb", "c\n\td\r\x9b2J"))

    assert event(serving, Failed).failure == Failure("a", 1, "a\n [2Jb", "c\n d  2J")


def test_a_failure_may_not_bring_tensors(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    header = wire.Header.FromString(packed(2**20)[0])
    header.failure.reason = "and 8 MiB for your disk"
    nonce = peer.hear("offer").nonce

    assert refused(lambda: peer.begin(nonce, header.SerializeToString()))[0] == Status.INVALID_ARGUMENT
    assert event(serving, Failed).failure.client == "a"


def test_a_defect_in_the_examination_fails_one_client_and_not_the_round(serve: Serve, join: Join, event: Wait) -> None:
    def check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
        if payload is not None:
            raise ZeroDivisionError("ours")

    serving = serve()
    peer = join(serving)
    ask(serving, check=check)

    assert peer.answer(peer.hear("offer").nonce, an_update()).status == wire.Receipt.REJECTED
    assert "ZeroDivisionError('ours')" in event(serving, Failed).failure.reason
