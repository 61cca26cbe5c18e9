"""A server as any program on the network may treat it: nothing but status codes, and others are not disturbed."""

from __future__ import annotations

import functools
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import grpc
import numpy as np
import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.errors import ConnectionRefused, InvalidUpdate
from shoal.protos.messages import Failure, Update
from shoal.protos.transport import CHUNK, SERVICE
from shoal.server import service
from shoal.server import serving as serving_module
from shoal.server.orders import Answered, Blob, Failed, Joined, Left, Order
from shoal.server.serving import Serving
from tests.server import asking
from tests.server.asking import journal_of

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

Status = grpc.StatusCode
Wait = Callable[[Serving, type[Any]], Any]
WAIT = 10.0
RPCS = ("Connect", "Download", "Begin", "Upload", "Commit")


def an_update(size: int = 3, value: float = 1.0) -> Update[np.ndarray]:
    return Update(np.full(size, value), 1)


def packed(size: int = 3, value: float = 1.0) -> tuple[bytes, bytes]:
    header, buffers = encode(an_update(size, value))
    return header, b"".join(buffers)


BIG = packed(5 * CHUNK // 16)  # two and a half chunks


def an_order(serving: Serving, **changes: Any) -> Order:
    fields: dict[str, Any] = {
        "run": "run",
        "round": 1,
        "assignment": Blob.of(b"what to do"),
        "header": b"a task",
        "payload": Blob.of(bytes(2 * CHUNK + 5)),
        "check": lambda client, content, header, payload: None,
        "journal": journal_of(serving),
        "lease": 60.0,
    }
    return Order(**(fields | changes))


def ask(serving: Serving, *clients: str, **changes: Any) -> Order:
    order = an_order(serving, **changes)
    asking.call(serving, order, dict.fromkeys(clients or ("a",), 0))
    return order


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """How a call ended that must not have succeeded."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


# --- hello ------------------------------------------------------------------------------------------------------------


def test_a_client_is_welcomed_and_known(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve(heartbeat=12.5)
    welcome = join(serving, "a", welcome=False, capabilities=["flying"]).welcome()

    assert (welcome.version, welcome.heartbeat, list(welcome.capabilities)) == (1, 12.5, [])
    assert event(serving, Joined).client == "a"
    assert serving.call(lambda: list(serving.hub.present)) == ["a"]


@pytest.mark.parametrize(("versions", "side"), [([], "client"), ([0], "client"), ([2, 3], "server")])
def test_another_protocol_is_told_which_side_to_upgrade(
    serve: Serve, join: Join, versions: list[int], side: str
) -> None:
    peer = join(serve(), welcome=False, versions=versions, software="other 9")
    code, why = refused(peer.welcome)

    assert (code, why.endswith(f"upgrade the {side}"), "other 9" in why) == (Status.FAILED_PRECONDITION, True, True)


def test_the_newest_common_version_is_chosen(serve: Serve, join: Join) -> None:
    assert join(serve(), welcome=False, versions=[0, 1, 7]).welcome().version == 1


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "x" * 201, "長" * 201])
def test_a_name_that_nobody_can_read_is_refused(serve: Serve, join: Join, name: str) -> None:
    code, why = refused(join(serve(), name, welcome=False).welcome)

    assert (code, "set --id" in why) == (Status.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("name", ["長" * 200, "🐟" * 200, "%" * 200, "../../etc", "[/red]"])
def test_any_other_name_will_do(serve: Serve, join: Join, name: str) -> None:
    serving = serve()
    join(serving, name)

    assert serving.call(lambda: list(serving.hub.present)) == [name]


def test_the_longest_reason_of_the_widest_characters_arrives(serve: Serve, join: Join) -> None:
    code, why = refused(join(serve(), welcome=False, versions=[9], software="🐟" * 9999).welcome)

    assert (code, "🐟" in why) == (Status.FAILED_PRECONDITION, True)


def test_the_first_message_must_be_a_hello(serve: Serve, join: Join) -> None:
    peer = join(serve())
    call = peer.stub.Connect(iter([wire.ConnectRequest(heartbeat=wire.Heartbeat())]), timeout=WAIT)

    assert refused(lambda: next(call)) == (Status.INVALID_ARGUMENT, "the first message of Connect must be a Hello")


def test_a_connection_without_a_message_is_refused(serve: Serve, join: Join) -> None:
    call = join(serve()).stub.Connect(iter(()), timeout=WAIT)

    assert refused(lambda: next(call))[0] == Status.INVALID_ARGUMENT


# --- bytes that are nothing -------------------------------------------------------------------------------------------


def raw(peer: Peer, rpc: str, *requests: bytes) -> bytes:
    """Call with bytes that need not be a message."""
    path, channel = f"/{SERVICE}/{rpc}", cast(Any, peer.channel)  # the stubs have no word for calls with bytes
    if rpc in ("Begin", "Commit"):
        reply: bytes = channel.unary_unary(path)(requests[0], timeout=WAIT)
    elif rpc == "Upload":
        reply = channel.stream_unary(path)(iter(requests), timeout=WAIT)
    elif rpc == "Download":
        reply = b"".join(channel.unary_stream(path)(requests[0], timeout=WAIT))
    else:
        reply = b"".join(channel.stream_stream(path)(iter(requests), timeout=WAIT))
    return reply


@pytest.mark.parametrize("rpc", RPCS)
def test_garbage_is_an_invalid_argument(serve: Serve, join: Join, rpc: str) -> None:
    code, why = refused(lambda: raw(join(serve()), rpc, b"\xff\x00garbage"))

    assert (code, why.startswith("the request is no ")) == (Status.INVALID_ARGUMENT, True)


def test_garbage_after_the_hello_ends_the_connection_only(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving, "b")
    hello = wire.ConnectRequest(hello=wire.Hello(versions=[1], client="a")).SerializeToString()
    raw(peer, "Connect", hello, b"\xff\xff")

    assert event(serving, Left).client == "a"
    peer.beat()


@pytest.mark.parametrize("rpc", RPCS[1:])
def test_a_call_without_a_connection_is_unauthenticated(serve: Serve, join: Join, rpc: str) -> None:
    kind = {"Upload": wire.UploadRequest, "Begin": wire.BeginRequest, "Commit": wire.CommitRequest}
    request = kind.get(rpc, wire.DownloadRequest)(session="not one")

    assert refused(lambda: raw(join(serve()), rpc, request.SerializeToString()))[0] == Status.UNAUTHENTICATED


def test_a_message_over_4_mib_is_refused(serve: Serve, join: Join) -> None:
    peer = join(serve())
    ask_too_much = functools.partial(raw, peer, "Begin", bytes(2**22 + 1))

    assert refused(ask_too_much)[0] == Status.RESOURCE_EXHAUSTED
    peer.beat()


def test_noise_on_the_port_disturbs_nobody(serve: Serve, join: Join) -> None:
    serving = serve()
    peer = join(serving)
    place = (serving.address.host, serving.address.port)
    with socket.create_connection(place, WAIT) as silent, socket.create_connection(place, WAIT) as noisy:
        noisy.sendall(np.random.default_rng(0).bytes(2**16))
        connection = http.client.HTTPConnection(*place, timeout=WAIT)
        connection.request("GET", "/")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            connection.getresponse()
        connection.close()
        peer.beat()
        join(serving, "b").beat()
        silent.close()


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_task_is_offered_fetched_and_answered(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving)
    order = ask(serving, "a", lease=42.0)
    offer = peer.hear("offer")
    receipt = peer.answer(offer.nonce, an_update())
    answered = event(serving, Answered)

    assert (offer.lease, offer.run, offer.header, offer.counted) == (42.0, "run", b"a task", 0)
    assert peer.download(offer.assignment.sha256) == b"what to do"
    assert peer.download(order.payload.sha256) == bytes(2 * CHUNK + 5)
    assert peer.download(order.payload.sha256, 2 * CHUNK) == bytes(5)
    assert peer.download(order.payload.sha256, 2**64 - 1) == b""
    assert receipt.status == wire.Receipt.ACCEPTED
    assert (answered.client, answered.nonce, answered.header) == ("a", offer.nonce, packed()[0])
    assert journal_of(serving).payload(answered.nonce).read_bytes() == packed()[1]


def test_a_task_is_offered_to_one_who_comes_later_and_again_after_each_break(serve: Serve, join: Join) -> None:
    serving = serve()
    ask(serving)
    first = join(serving)
    nonce = first.hear("offer").nonce
    first.leave()

    assert join(serving).hear("offer").nonce == nonce


def test_another_clients_task_is_not_found(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    mine, other = join(serving, "a"), join(serving, "b")
    ask(serving, "a", "b")
    nonce = mine.hear("offer").nonce
    header, payload = packed()
    mine.begin(nonce, header)
    calls = [
        lambda: other.begin(nonce, header),
        lambda: other.upload(nonce, payload),
        lambda: other.commit(nonce),
        lambda: other.begin("", header),
    ]

    assert [refused(call)[0] for call in calls] == [Status.NOT_FOUND] * 4
    assert mine.answer(nonce, an_update()).status == wire.Receipt.ACCEPTED


def test_content_that_is_not_on_offer_is_not_found(serve: Serve, join: Join) -> None:
    serving = serve()
    peer = join(serving)
    order = ask(serving)
    serving.call(serving.hub.end, order, "over")

    assert refused(lambda: peer.download(order.payload.sha256))[0] == Status.NOT_FOUND
    assert refused(lambda: peer.download(b""))[0] == Status.NOT_FOUND


def test_an_order_that_ends_withdraws_its_tasks_and_leaves_no_file(
    serve: Serve, join: Join, spool: Callable[[], list[str]]
) -> None:
    serving = serve()
    done, late = join(serving, "a"), join(serving, "b")
    order = ask(serving, "a", "b")
    nonce, header = late.hear("offer").nonce, packed()[0]
    done.answer(done.hear("offer").nonce, an_update())
    late.begin(nonce, header)
    serving.call(serving.hub.end, order, "enough")
    withdrawal = late.hear("withdrawal")

    assert (withdrawal.nonce, withdrawal.reason) == (nonce, "enough")
    assert refused(lambda: late.begin(nonce, header))[0] == Status.NOT_FOUND
    assert refused(lambda: late.commit(nonce))[0] == Status.NOT_FOUND
    assert spool() == []
    done.beat()  # and no withdrawal came before


# --- answers on their way ---------------------------------------------------------------------------------------------


@pytest.fixture
def begun(serve: Serve, join: Join) -> tuple[Serving, Peer, str]:
    """A client that has announced a large answer."""
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce
    assert peer.begin(nonce, BIG[0]) == 0
    return serving, peer, nonce


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
    writing, go = _slowly(monkeypatch, "shoal.server.spool.Incoming._write")
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


def test_an_upload_whose_round_ends_is_told_so(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch, spool: Callable[[], list[str]]
) -> None:
    serving, peer, nonce = begun
    writing, go = _slowly(monkeypatch, "shoal.server.spool.Incoming._write")
    pieces = [peer.piece(nonce, at, BIG[1][at : at + CHUNK]) for at in range(0, len(BIG[1]), CHUNK)]
    call = peer.stub.Upload.future(iter(pieces))
    assert writing.wait(WAIT)
    (assigned,) = serving.hub._open.values()
    serving.call(serving.hub.end, assigned.order, "over")
    go.set()

    assert refused(lambda: call.result(WAIT))[0] in (Status.NOT_FOUND, Status.ABORTED)
    assert spool() == []


def test_a_full_disk_loses_nothing(
    begun: tuple[Serving, Peer, str], monkeypatch: pytest.MonkeyPatch, spool: Callable[[], list[str]]
) -> None:
    _, peer, nonce = begun
    peer.send([peer.piece(nonce, 0, BIG[1][:CHUNK])])
    with monkeypatch.context() as full:
        full.setattr("shoal.server.spool.Incoming._write", _half)
        code, why = refused(lambda: peer.upload(nonce, BIG[1], CHUNK))
        assert (code, "No space left" in why) == (Status.RESOURCE_EXHAUSTED, True)

    assert peer.upload(nonce, BIG[1], CHUNK) == len(BIG[1])
    assert peer.commit(nonce).status == wire.Receipt.ACCEPTED


def _half(self: Any, data: bytes) -> None:
    """As a disk that has room for a part of the bytes."""
    with self.path.open("r+b") as file:
        file.seek(self.offset)
        file.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device")


def _slowly(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, threading.Event]:
    """Let a function wait: an event that says that it was called, and one that lets it go on."""
    called, go = threading.Event(), threading.Event()
    module, _, method = name.rpartition(".")
    owner = _find(module)
    original = getattr(owner, method)

    def slow(*arguments: Any) -> Any:
        called.set()
        assert go.wait(WAIT)
        return original(*arguments)

    monkeypatch.setattr(owner, method, slow)
    return called, go


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


# --- answers that are refused -----------------------------------------------------------------------------------------


def test_a_wrong_sha256_is_found_at_the_commit(begun: tuple[Serving, Peer, str], event: Wait) -> None:
    serving, peer, nonce = begun
    peer.upload(nonce, BIG[1][:-1] + b"!")
    receipts = [peer.commit(nonce) for _ in range(2)]
    failed = event(serving, Failed)

    assert {receipt.status for receipt in receipts} == {wire.Receipt.REJECTED}
    assert (failed.nonce, failed.failure.client) == (nonce, "a")
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
    assert event(serving, Failed).failure == Failure("a", 1, "a claims too much")
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
    told = Failure("somebody else", 9, "it broke", "x" * 30_000)

    assert peer.answer(peer.hear("offer").nonce, told).status == wire.Receipt.ACCEPTED
    assert event(serving, Failed).failure == Failure("a", 1, "it broke", "x" * 20_000)


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


# --- who is there -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks for those who are gone all the time."""
    monkeypatch.setattr(serving_module, "TICK", 0.01)


def test_a_second_process_of_the_same_name_replaces_the_first(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    first = join(serving)
    ask(serving)
    nonce = first.hear("offer").nonce
    second = join(serving, instance="two")
    goodbye = first.hear("goodbye")

    assert (goodbye.advice, "another process" in goodbye.reason) == (wire.Goodbye.REPLACED, True)
    assert second.hear("offer").nonce == nonce
    assert refused(lambda: first.commit(nonce))[0] == Status.UNAUTHENTICATED
    assert second.answer(nonce, an_update()).status == wire.Receipt.ACCEPTED


def test_a_connection_that_a_newer_one_of_its_process_takes_over_is_not_told_to_stay_away(
    serve: Serve, join: Join
) -> None:
    serving = serve()
    first = join(serving)
    join(serving)

    assert first.hear("goodbye").advice == wire.Goodbye.COME_BACK


def test_an_upload_of_a_process_that_was_replaced_ends(
    begun: tuple[Serving, Peer, str], join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, first, nonce = begun
    writing, go = _slowly(monkeypatch, "shoal.server.spool.Incoming._write")
    pieces = [first.piece(nonce, at, BIG[1][at : at + CHUNK]) for at in range(0, len(BIG[1]), CHUNK)]
    call = first.stub.Upload.future(iter(pieces))
    assert writing.wait(WAIT)
    second = join(serving, instance="two")
    go.set()

    assert refused(lambda: call.result(WAIT))[0] == Status.UNAUTHENTICATED
    assert second.begin(nonce, BIG[0]) == CHUNK


def test_one_who_leaves_is_told_of_once(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving)
    event(serving, Joined)
    peer.leave()

    assert event(serving, Left).client == "a"
    assert serving.events.empty()
    assert refused(lambda: peer.begin("", b""))[0] == Status.UNAUTHENTICATED


def test_a_client_without_a_heartbeat_is_dropped(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve(heartbeat=0.01)
    peer = join(serving)

    assert event(serving, Left).reason.startswith("no heartbeat for ")
    assert peer.hear("goodbye").advice == wire.Goodbye.COME_BACK
    assert serving.call(lambda: list(serving.hub.present)) == []


def test_a_lease_ends_without_a_sign(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving, lease=0.01)
    failed = event(serving, Failed)

    assert "was lost: no sign of it" in failed.failure.reason
    assert peer.hear("withdrawal").nonce == failed.nonce


@pytest.mark.slow
def test_only_the_task_that_a_heartbeat_names_is_kept(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving, lease=0.1)
    busy = peer.hear("offer").nonce
    end = time.monotonic() + 0.25
    while time.monotonic() < end:
        peer.beat(busy)

    assert [e for e in _drained(serving) if isinstance(e, Failed)] == []
    failing = threading.Event()

    def idle() -> None:
        while not failing.is_set():
            peer.beat()

    thread = threading.Thread(target=idle)
    thread.start()
    try:
        assert event(serving, Failed).nonce == busy
    finally:
        failing.set()
        thread.join(WAIT)


def _drained(serving: Serving) -> Iterator[object]:
    while not serving.events.empty():
        yield serving.events.get()


def test_a_deadline_ends_the_task_of_one_who_is_alive(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving, ends=0.0)

    assert "before the deadline" in event(serving, Failed).failure.reason
    assert peer.hear("withdrawal").reason == "client 'a' did not answer before the deadline"


# --- who is slow ------------------------------------------------------------------------------------------------------


def test_uploads_that_stall_do_not_stop_others(serve: Serve, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "QUICK", 0.02)
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce
    stop = threading.Event()
    stalled = [peer.stub.Upload.future(_silent(stop)) for _ in range(2 * service.UPLOADS)]

    assert peer.answer(nonce, an_update()).status == wire.Receipt.ACCEPTED
    for call in stalled:
        call.cancel()
    stop.set()


def _silent(stop: threading.Event) -> Iterator[wire.UploadRequest]:
    stop.wait(WAIT)
    yield from ()


@pytest.mark.slow
def test_downloads_that_nobody_reads_do_not_stop_others(
    serve: Serve, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "QUICK", 0.02)
    serving = serve()
    peer, other = join(serving, "a"), join(serving, "b")
    order = ask(serving, payload=Blob.of(bytes(2**24)))
    request = wire.DownloadRequest(session=peer.session, sha256=order.payload.sha256)
    stalled = [peer.stub.Download(request) for _ in range(2 * service.DOWNLOADS)]
    for call in stalled:
        next(call)

    assert len(other.download(order.payload.sha256)) == 2**24
    for call in stalled:
        call.cancel()


def test_one_who_is_silent_for_too_long_is_told_to_call_again(
    serve: Serve, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IDLE", 0.02)
    peer, stop = join(serve()), threading.Event()
    call = peer.stub.Upload.future(_silent(stop))

    assert refused(lambda: call.result(WAIT))[0] == Status.DEADLINE_EXCEEDED
    stop.set()


# --- coming and going of the server -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("finished", "advice"), [(True, wire.Goodbye.FINISHED), (False, wire.Goodbye.COME_BACK)])
def test_a_server_that_closes_says_goodbye(serve: Serve, join: Join, finished: bool, advice: int) -> None:
    serving = serve()
    peer = join(serving)
    serving.close(finished)
    serving.close()

    assert peer.hear("goodbye").advice == advice


def test_a_port_in_use_is_one_clear_sentence(serve: Serve) -> None:
    taken = serve().address
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with pytest.raises(ConnectionRefused, match=r"cannot listen on .*in use\); choose another address"):
            serve(f"{host}:{taken.port}")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 70])
def test_a_host_that_is_none_is_one_clear_sentence(serve: Serve, host: str) -> None:
    with pytest.raises(ConnectionRefused, match="there is no host"):
        serve(f"{host}:0")


def test_an_address_of_another_machine_cannot_be_listened_on(serve: Serve) -> None:
    with pytest.raises(ConnectionRefused, match=r"cannot listen on 192\.0\.2\.1:0"):
        serve("192.0.2.1:0")


def test_bytes_on_their_way_wait_for_the_next_server(serve: Serve, join: Join, spool: Callable[[], list[str]]) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce
    peer.begin(nonce, packed()[0])
    serving.close()

    assert spool() == [nonce]
