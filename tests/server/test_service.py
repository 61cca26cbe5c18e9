"""A server as any program on the network may treat it: nothing but status codes, and others are not disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from grpc import aio

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.transport import CHUNK, SERVICE
from shoal.server import service
from shoal.server.orders import Answered, Blob, Joined, Left
from tests.server.asking import Status, Wait, an_update, ask, journal_of, packed, refused

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

WAIT = 10.0
RPCS = ("Connect", "Download", "Begin", "Upload", "Commit")


# --- hello ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(22)
def test_a_client_is_welcomed_and_known(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve(heartbeat=12.5)
    welcome = join(serving, "a", welcome=False, capabilities=["flying"]).welcome()

    assert (welcome.version, welcome.heartbeat, list(welcome.capabilities)) == (1, 12.5, [])
    assert event(serving, Joined).client == "a"
    assert serving.call(lambda: list(serving.hub.present)) == ["a"]


@pytest.mark.parametrize(("versions", "side"), [([], "client"), ([0], "client"), ([2, 3], "server")])
@pytest.mark.fault(22)
def test_another_protocol_is_told_which_side_to_upgrade(
    serve: Serve, join: Join, versions: list[int], side: str
) -> None:
    peer = join(serve(), welcome=False, versions=versions, software="other 9")
    code, why = refused(peer.welcome)

    assert (code, why.endswith(f"upgrade the {side}"), "other 9" in why) == (Status.FAILED_PRECONDITION, True, True)


@pytest.mark.fault(22)
def test_the_newest_common_version_is_chosen(serve: Serve, join: Join) -> None:
    assert join(serve(), welcome=False, versions=[0, 1, 7]).welcome().version == 1


@pytest.mark.fault(22)
def test_what_a_later_version_says_beside_is_passed_over(serve: Serve, join: Join) -> None:
    """Fields that this version does not know, in a hello and in a heartbeat."""
    unknown = b"\xa2\x06\x03new"  # field 100, three bytes
    hello = wire.ConnectRequest(hello=wire.Hello(versions=[1], client="later", capabilities=["flying"]))
    beat = wire.ConnectRequest(heartbeat=wire.Heartbeat())
    replies = raw(join(serve()), "Connect", hello.SerializeToString() + unknown, beat.SerializeToString() + unknown)
    welcome = wire.ConnectReply.FromString(replies)  # one message behind the other: of each field the last

    assert (welcome.HasField("heartbeat"), b"flying" in replies) == (True, False)


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
@pytest.mark.fault(19)
def test_garbage_is_an_invalid_argument(serve: Serve, join: Join, rpc: str) -> None:
    code, why = refused(lambda: raw(join(serve()), rpc, b"\xff\x00garbage"))

    assert (code, why.startswith("the request is no ")) == (Status.INVALID_ARGUMENT, True)


@pytest.mark.fault(19)
def test_garbage_after_the_hello_ends_the_connection_only(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving, "b")
    hello = wire.ConnectRequest(hello=wire.Hello(versions=[1], client="a")).SerializeToString()
    raw(peer, "Connect", hello, b"\xff\xff")

    assert event(serving, Left).client == "a"
    peer.beat()


@pytest.mark.parametrize("rpc", RPCS[1:])
@pytest.mark.fault(7)
def test_a_call_without_a_connection_is_unauthenticated(serve: Serve, join: Join, rpc: str) -> None:
    kind = {"Upload": wire.UploadRequest, "Begin": wire.BeginRequest, "Commit": wire.CommitRequest}
    request = kind.get(rpc, wire.DownloadRequest)(session="not one")

    assert refused(lambda: raw(join(serve()), rpc, request.SerializeToString()))[0] == Status.UNAUTHENTICATED


@pytest.mark.fault(10)
def test_a_message_over_4_mib_is_refused(serve: Serve, join: Join) -> None:
    peer = join(serve())
    ask_too_much = functools.partial(raw, peer, "Begin", bytes(2**22 + 1))

    assert refused(ask_too_much)[0] == Status.RESOURCE_EXHAUSTED
    peer.beat()


@pytest.mark.fault(15, 19)
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


@pytest.mark.slow
@pytest.mark.fault(15)
@pytest.mark.skipif(sys.platform != "linux", reason="so many sockets at once")
def test_hundreds_of_connections_that_say_nothing_or_a_byte_now_and_then_take_nobodys_place(
    serve: Serve, join: Join
) -> None:
    serving = serve()
    place = (serving.address.host, serving.address.port)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    with contextlib.ExitStack() as open_:
        idle = [open_.enter_context(socket.create_connection(place, WAIT)) for _ in range(300)]
        for number, one in enumerate(idle):
            one.sendall(preface[: number % len(preface)])
        peer = join(serving)
        ask(serving)
        nonce = peer.hear("offer").nonce
        for number, one in enumerate(idle):
            one.sendall(preface[number % len(preface) :][:1])
        assert peer.answer(nonce, an_update()).status == wire.Receipt.ACCEPTED
        join(serving, "b").beat()


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


@pytest.mark.fault(7)
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


def test_content_that_orders_share_is_on_offer_until_the_last_one_ends(serve: Serve, join: Join) -> None:
    serving = serve()
    peer, blob = join(serving), Blob.of(b"what both are sent")
    orders = [ask(serving, client, payload=blob) for client in "ab"]
    for order in orders:
        assert peer.download(blob.sha256) == b"what both are sent"
        serving.call(serving.hub.end, order, "enough")

    assert refused(lambda: peer.download(blob.sha256))[0] == Status.NOT_FOUND


def test_one_who_brings_an_app_is_told_that_there_are_experiments_here(serve: Serve, join: Join) -> None:
    about = [wire.NamedSetting(name="app", value=wire.Setting(text="averaging"))]
    code, told = refused(lambda: join(serve(), about=about))

    assert code == Status.FAILED_PRECONDITION and "connect with 'shoal client'" in told


@pytest.mark.fault(12)
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


# --- who is slow ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(15)
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
@pytest.mark.fault(15)
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


@pytest.mark.fault(15)
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
@pytest.mark.fault(26)
def test_a_server_that_closes_says_goodbye(serve: Serve, join: Join, finished: bool, advice: int) -> None:
    serving = serve()
    peer = join(serving)
    serving.close(finished)
    serving.close()

    assert peer.hear("goodbye").advice == advice


@pytest.mark.fault(26)
def test_grpc_does_not_tell_of_clients_that_hang_up_as_of_errors(serve: Serve, errors: list[str]) -> None:
    """It has two such messages, both for a client that leaves in the moment in which its call begins or ends."""
    serve()
    for error in (aio.InternalError("the status was not sent"), asyncio.CancelledError(), ValueError("ours")):
        logging.getLogger("grpc._cython.cygrpc").error("a call has failed: %r", error, exc_info=error)

    said = errors.pop()
    assert (said.splitlines()[0], errors) == ("a call has failed: ValueError('ours')", [])


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


@pytest.mark.fault(1, 3)
def test_bytes_on_their_way_wait_for_the_next_server(serve: Serve, join: Join, spool: Callable[[], list[str]]) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving)
    nonce = peer.hear("offer").nonce
    peer.begin(nonce, packed()[0])
    serving.close()

    assert spool() == [nonce]
