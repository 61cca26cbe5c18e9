"""A client's connection: what it says when there is none, when it gives up, and how it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from shoal.client.link import Link
from shoal.client.transfer import deliver
from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.transport import CHANNEL, CHUNK, SERVER, Address
from shoal.server.service import handlers
from shoal.server.serving import Serving
from shoal.server.spool import Incoming
from tests.chaos.proxy import Proxy
from tests.client.test_transfer import answer, ask

if TYPE_CHECKING:
    from tests.client.conftest import Between, Connect, Serve

Status = grpc.StatusCode


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [option for option in CHANNEL if "backoff" not in option[0]]
    short += [(f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("min", "initial", "max")]
    monkeypatch.setattr("shoal.client.link.CHANNEL", short)
    monkeypatch.setattr("shoal.client.link.SLOWEST", 0.1)


class Replies(grpc.GenericRpcHandler):
    """A server whose Connect says what a test wants."""

    def __init__(self, connect: Any, real: grpc.GenericRpcHandler) -> None:
        self._connect, self._real = connect, real

    def service(self, details: Any) -> Any:
        if not details.method.endswith("Connect"):
            return self._real.service(details)
        return grpc.stream_stream_rpc_method_handler(
            self._connect, wire.ConnectRequest.FromString, wire.ConnectReply.SerializeToString
        )


Handler = Callable[[Any, Any], AsyncIterator[wire.ConnectReply]]


def replying(serve: Serve, connect: Handler) -> Serving:
    return serve(service=lambda hub: Replies(connect, handlers(hub)))


def failing(serve: Serve, code: grpc.StatusCode, said: str) -> Serving:
    async def connect(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        await anext(requests)
        await context.abort(code, said)
        yield wire.ConnectReply()

    return replying(serve, connect)


def welcome(**changes: Any) -> wire.ConnectReply:
    fields: dict[str, Any] = {"version": 1, "software": "a test", "session": "s", "heartbeat": 30.0}
    return wire.ConnectReply(welcome=wire.Welcome(**(fields | changes)))


@contextmanager
def listening(answer: bytes | None) -> Iterator[Address]:
    """What is no gRPC server: it says the same to everybody and hangs up, or with None nothing at all."""
    over = threading.Event()

    class Speak(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if answer is None:
                over.wait()
                return
            with contextlib.suppress(ConnectionError):
                self.request.recv(1)
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Speak) as server:  # whose end waits for all who speak
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield Address("127.0.0.1", server.server_address[1])
        finally:
            over.set()
            server.shutdown()
            serving.join()


async def given_up(address: Address, patience: float | None = 0.0, once: bool = True) -> str:
    """What the link says in the end."""
    link = Link(address, None, "a", lambda reply: None, lambda text: None)
    with pytest.raises(ConnectionRefused) as caught:
        await link.run(once=once, patience=patience)
    return str(caught.value)


# --- no server --------------------------------------------------------------------------------------------------------


def nobody() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return Address("127.0.0.1", door.getsockname()[1])


async def test_nothing_listens() -> None:
    address = nobody()

    assert await given_up(address) == (
        f"nothing answers at {address} (TCP: Connection refused); start the server there, or correct the "
        f"address or the firewall"
    )


async def test_a_host_that_does_not_exist() -> None:
    assert "there is no host 'nowhere.invalid'" in await given_up(Address("nowhere.invalid", 1))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"SSH-2.0-x\r\n", b""])
async def test_another_kind_of_server(answer: bytes) -> None:
    with listening(answer) as address:
        said = await given_up(address)

    assert said.startswith(f"what answers at {address} speaks no plain gRPC; ")


async def test_a_server_of_another_service(serve: Serve) -> None:
    class Nothing(grpc.GenericRpcHandler):
        def service(self, details: Any) -> None:
            return None

    address = serve(service=lambda hub: Nothing()).address

    assert await given_up(address, None) == f"what answers at {address} is no Shoal server; correct the address"


@pytest.mark.slow
async def test_a_server_that_takes_the_connection_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.client.link.HELLO", 0.2)
    monkeypatch.setattr("shoal.client.diagnose.PATIENCE", 0.2)
    with listening(None) as address:
        said = await given_up(address)

    assert said.startswith(f"what answers at {address} speaks no plain gRPC; ")


async def test_a_shoal_server_that_does_not_answer_the_hello(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        await asyncio.Event().wait()
        yield welcome()

    monkeypatch.setattr("shoal.client.link.HELLO", 0.1)

    assert await given_up(replying(serve, connect).address) == "the server does not answer"


@pytest.mark.slow
@pytest.mark.fault(5)
async def test_without_patience_it_waits_for_a_server(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    address = nobody()
    async with connect(address) as link:
        said = await link.says("nothing answers")
        serve(address=str(address))
        session = await link.session()

    assert said.endswith("; trying again")
    assert session


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [Status.PERMISSION_DENIED, Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION])
async def test_a_refusal_for_good_is_the_servers_own_sentence(serve: Serve, code: grpc.StatusCode) -> None:
    assert await given_up(failing(serve, code, "no; set --id").address, None) == "no; set --id"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (Status.PERMISSION_DENIED, "says no (permission_denied)"),
        (Status.UNAVAILABLE, "does not answer"),
        (Status.INTERNAL, "the connection failed (internal: no reason given)"),
    ],
)
async def test_a_refusal_without_a_word_is_a_sentence_too(serve: Serve, code: grpc.StatusCode, words: str) -> None:
    assert words in await given_up(failing(serve, code, "").address)


@pytest.mark.slow
@pytest.mark.parametrize("code", [Status.RESOURCE_EXHAUSTED, Status.UNKNOWN])
async def test_what_may_pass_is_tried_again(serve: Serve, connect: Connect, code: grpc.StatusCode) -> None:
    calls = list[int]()

    async def answer(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        calls.append(1)
        await anext(requests)
        if len(calls) < 3:
            await context.abort(code, "not now")
        yield welcome()
        await asyncio.Event().wait()

    async with connect(replying(serve, answer).address) as link:
        said = await link.says("not now")
        await link.session()

    assert said == f"the connection failed ({code.name.lower()}: not now); trying again"
    assert link.said.qsize() == 1  # the same is not said twice


@pytest.mark.parametrize("client", ["", "a\nb", "x" * 201])
async def test_a_name_that_the_server_does_not_take(serve: Serve, client: str) -> None:
    link = Link(serve().address, None, client, lambda reply: None, lambda text: None)
    with pytest.raises(ConnectionRefused, match="is no client name: 1 to 200 printable characters; set --id"):
        await link.run(once=False, patience=None)


@pytest.mark.fault(22)
async def test_a_server_of_another_version(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.client.link.VERSIONS", (9,))

    assert (await given_up(serve().address, None)).endswith("upgrade the server")


@pytest.mark.fault(22)
async def test_a_server_that_chooses_a_version_nobody_offered(serve: Serve) -> None:
    async def connect(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        yield welcome(version=7)

    assert "upgrade this client" in await given_up(replying(serve, connect).address, None)


async def test_another_process_with_the_same_name(serve: Serve, connect: Connect) -> None:
    address = serve().address
    first = asyncio.create_task(given_up(address, None))
    while True:  # until the first one is there, the second one replaces nobody
        async with connect(address) as second:
            await second.session()
            done, _ = await asyncio.wait([first], timeout=0.5)
            if done:
                break

    assert "another process has joined as 'a' from" in first.result()
    assert first.result().endswith("give each client its own --id")


# --- goodbyes ---------------------------------------------------------------------------------------------------------


async def test_a_server_that_has_finished(serve: Serve, connect: Connect) -> None:
    serving = serve()
    link = Link(serving.address, None, "a", lambda reply: None, lambda text: None)
    running = asyncio.create_task(link.run(once=True, patience=None))
    await link.session()
    await asyncio.to_thread(serving.close, finished=True)
    await running

    assert running.exception() is None


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
async def test_the_next_server_at_the_address_is_joined(serve: Serve, connect: Connect, finished: bool) -> None:
    first = serve()
    async with connect(first.address) as link:
        one = await link.session()
        await asyncio.to_thread(first.close, finished=finished)
        await link.says("trying again")
        serve(address=str(first.address))
        await link.says("connected to")
        two = await link.session()

    assert one != two


# --- breaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(5)
async def test_a_connection_that_breaks_is_made_again_and_each_break_is_told(
    serve: Serve, between: Between, connect: Connect
) -> None:
    serving = serve()
    network, sessions = between(serving.address), set[str]()
    async with connect(network.address) as link:
        for _ in range(3):
            await link.says("connected to")
            sessions.add(await link.session())
            network.cut()
            await link.says("the connection broke; trying again")

    assert len(sessions) == 3


@asynccontextmanager
async def proxy(target: Address) -> AsyncIterator[tuple[Proxy, Address]]:
    proxy = Proxy(target.port, random.Random(0))
    await proxy.start()
    try:
        yield proxy, Address("127.0.0.1", proxy.port)
    finally:
        await proxy.close()


@pytest.mark.slow
@pytest.mark.fault(5)
async def test_a_half_open_connection_is_left_for_a_new_one(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calling on the old one would wait for its keepalive: 63 s were measured, more than a test here may take."""
    monkeypatch.setattr("shoal.client.link.HELLO", 1.0)
    serving = serve(heartbeat=0.1)
    async with proxy(serving.address) as (between, address), connect(address) as link:
        for _ in range(2):
            await link.says("connected to")
            before = await link.session()
            assert between.silence() == 1
            assert await link.says("trying again") == "the server does not answer; trying again"

        await link.says("connected to")
        assert await link.session() != before


@pytest.mark.slow
@pytest.mark.fault(5)
async def test_an_upload_goes_on_when_its_connection_has_become_half_open(
    serve: Serve, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, loop, silenced = serve(heartbeat=0.1), asyncio.get_running_loop(), list[int]()
    header, payload = answer(tmp_path, 12 * CHUNK // 8)
    async with proxy(serving.address) as (between, address), connect(address) as link:
        write = Incoming._write

        def written(incoming: Incoming, chunks: Sequence[wire.Chunk]) -> None:
            write(incoming, chunks)
            if not silenced:
                silenced.append(incoming.offset)
                asyncio.run_coroutine_threadsafe(_silence(between), loop).result(10)

        monkeypatch.setattr(Incoming, "_write", written)
        ask(serving)
        receipt = await deliver(link, (await link.offer()).nonce, header, payload)

    assert receipt.status == wire.Receipt.ACCEPTED
    assert 0 < silenced[0] < payload.stat().st_size


@pytest.mark.slow
@pytest.mark.fault(5)
async def test_pings_find_a_half_open_connection_where_heartbeats_are_far_apart(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms", "grpc.keepalive_timeout_ms")
    assert dict(CHANNEL).keys() >= set(times)
    monkeypatch.setattr("shoal.client.link.CHANNEL", list((dict(CHANNEL) | dict.fromkeys(times, 500)).items()))
    serving = serve(heartbeat=30.0)
    async with proxy(serving.address) as (between, address), connect(address) as link:
        before = await link.session()
        await _silence(between)  # before the first ping: the server would take so many for an attack
        await link.says("the connection broke; trying again")
        await link.says("connected to")

        assert await link.session() != before


async def _silence(between: Proxy) -> None:
    assert between.silence() == 1


def test_clients_do_not_ping_more_often_than_the_server_allows() -> None:
    allowed = dict(SERVER)["grpc.http2.min_recv_ping_interval_without_data_ms"]

    assert dict(CHANNEL)["grpc.keepalive_time_ms"] > allowed


@pytest.mark.fault(5)
async def test_heartbeats_without_an_answer_are_the_end_of_a_connection(serve: Serve, connect: Connect) -> None:
    async def answer(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        yield welcome(heartbeat=0.05)
        await asyncio.Event().wait()

    async with connect(replying(serve, answer).address) as link:
        await link.says("connected to")

        assert await link.says("trying again") == "the server does not answer; trying again"


async def test_every_heartbeat_names_the_task_in_hand(serve: Serve, connect: Connect) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def answer(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        yield welcome(heartbeat=0.05)
        async for request in requests:
            if request.HasField("heartbeat"):
                loop.call_soon_threadsafe(heard.put_nowait, request.heartbeat.nonce)
                yield wire.ConnectReply(heartbeat=wire.Heartbeat())

    async with connect(replying(serve, answer).address) as link:
        idle = await heard.get()
        link.working = "n"
        while (busy := await heard.get()) == idle:
            pass

    assert (idle, busy) == ("", "n")


async def test_offers_and_withdrawals_are_heard_in_their_order(serve: Serve, connect: Connect) -> None:
    async def answer(requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
        yield welcome()
        yield wire.ConnectReply(offer=wire.Offer(nonce="n"))
        yield wire.ConnectReply(withdrawal=wire.Withdrawal(nonce="n", reason="over"))
        await asyncio.Event().wait()

    async with connect(replying(serve, answer).address) as link:
        heard = [(await link.heard.get()).WhichOneof("content") for _ in range(2)]

    assert heard == ["offer", "withdrawal"]


@pytest.mark.parametrize("steps", range(5))
async def test_a_reply_that_comes_at_that_moment_keeps_nobody_from_leaving(steps: int) -> None:
    come, link = asyncio.Event(), Link(nobody(), None, "a", lambda reply: None, lambda text: None)

    class Call:
        async def read(self) -> wire.ConnectReply:
            await come.wait()
            return welcome()

    reading = asyncio.create_task(link._read(Call(), 30.0))
    await asyncio.sleep(0.01)
    come.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    asked = reading.cancel()
    await asyncio.wait([reading])

    assert reading.cancelled() == asked
