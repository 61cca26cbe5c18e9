"""Tensors through a network that breaks: everything arrives, once, and nothing that is wrong is kept."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from shoal.client.transfer import Depot, Over, deliver
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.errors import InvalidUpdate
from shoal.protos.messages import Failure, Update
from shoal.protos.transport import CHANNEL, CHUNK
from shoal.server.hub import Hub
from shoal.server.orders import Answered, Blob, Order
from shoal.server.service import handlers
from shoal.server.serving import Serving
from tests.server.asking import call, journal_of

if TYPE_CHECKING:
    from tests.client.conftest import Between, Connect, Serve

BIG = random.Random(0).randbytes(6 * CHUNK + 12_345)
Status = grpc.StatusCode


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [option for option in CHANNEL if "backoff" not in option[0]]
    short += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
    monkeypatch.setattr("shoal.client.link.CHANNEL", short)
    monkeypatch.setattr("shoal.client.transfer.PAUSE", 0.01)
    monkeypatch.setattr("shoal.client.transfer.TRIES", 3)


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    (tmp_path / "cache").mkdir()
    return Depot(tmp_path / "cache")


def ask(serving: Serving, payload: bytes = BIG, *clients: str, **changes: Any) -> Order:
    fields: dict[str, Any] = {
        "run": "run",
        "round": 1,
        "assignment": Blob.of(b"what to do"),
        "header": b"a task",
        "payload": Blob.of(payload),
        "check": lambda client, content, header, payload: None,
        "journal": journal_of(serving),
        "lease": 60.0,
    }
    order = Order(**(fields | changes))
    call(serving, order, dict.fromkeys(clients or ("a",), 0))
    return order


def answer(place: Path, size: int = 6 * CHUNK // 8 + 1000) -> tuple[bytes, Path]:
    """The header of an update and the file of its payload."""
    header, buffers = encode(Update(np.random.default_rng(0).normal(size=size), 1))
    path = place / "answer.payload"
    path.write_bytes(b"".join(buffers))
    return header, path


def cuts(count: int, seed: int) -> Any:
    """Where ``count`` connections break: every other one before the first byte of a tensor, the rest within it."""
    draw = random.Random(seed)
    return iter([draw.randrange(200, 1500) if i % 2 else draw.randrange(2 * CHUNK, 3 * CHUNK) for i in range(count)])


class Calls(grpc.GenericRpcHandler):
    """The real service, but for one call."""

    def __init__(self, hub: Hub, name: str, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        self._real, self._name, self._handler = handlers(hub), name, handler

    def service(self, details: Any) -> Any:
        return self._handler if details.method.endswith(self._name) else self._real.service(details)


def failing(name: str, code: grpc.StatusCode, said: str, calls: list[str]) -> Callable[[Hub], Calls]:
    """A server whose call ``name`` only ever fails."""

    async def fail(request: Any, context: Any) -> None:
        calls.append(name)
        await context.abort(code, said)

    kinds = {"Download": grpc.unary_stream_rpc_method_handler, "Upload": grpc.stream_unary_rpc_method_handler}
    return lambda hub: Calls(hub, name, kinds.get(name, grpc.unary_unary_rpc_method_handler)(fail))


# --- to the client ----------------------------------------------------------------------------------------------------


async def test_content_arrives_and_is_kept(serve: Serve, connect: Connect, depot: Depot) -> None:
    serving = serve()
    order = ask(serving)
    async with connect(serving.address) as link:
        path = await depot.fetch(link, order.payload.content)
        serving.call(serving.hub.end, order, "over")
        again = await depot.fetch(link, order.payload.content)

    assert path.read_bytes() == BIG
    assert again == path


@pytest.mark.parametrize("content", [b"", b"x", bytes(CHUNK), bytes(CHUNK + 1)])
async def test_content_of_any_size(serve: Serve, connect: Connect, depot: Depot, content: bytes) -> None:
    serving = serve()
    order = ask(serving, content)
    async with connect(serving.address) as link:
        assert (await depot.fetch(link, order.payload.content)).read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.fault(5)
async def test_a_download_goes_on_where_it_broke(
    serve: Serve, between: Between, connect: Connect, depot: Depot, seed: int
) -> None:
    serving = serve()
    order, network = ask(serving), between(serving.address, cuts(4, seed))
    async with connect(network.address) as link:
        path = await depot.fetch(link, order.payload.content)

    assert path.read_bytes() == BIG
    assert network.broken == 4
    assert network.down < len(BIG) + 3 * CHUNK  # at most a chunk, and what was on its way, each time that it broke


async def test_the_clients_of_a_process_fetch_once(
    serve: Serve, between: Between, connect: Connect, depot: Depot
) -> None:
    serving = serve()
    order, network = ask(serving, BIG, "a", "b", "c"), between(serving.address)
    async with (
        connect(network.address, "a") as a,
        connect(network.address, "b") as b,
        connect(network.address, "c") as c,
    ):
        paths = await asyncio.gather(*(depot.fetch(link, order.payload.content) for link in (a, b, c, a)))

    assert len(set(paths)) == 1
    assert network.down < 1.2 * len(BIG)


@pytest.mark.parametrize("stale", [b"of something else", bytes(len(BIG)), bytes(len(BIG) + 7), BIG[:-1] + b"?"])
async def test_a_wrong_beginning_is_thrown_away(serve: Serve, connect: Connect, depot: Depot, stale: bytes) -> None:
    serving = serve()
    order = ask(serving)
    part = depot._folder / f"{order.payload.sha256.hex()}.part"
    part.write_bytes(stale)
    async with connect(serving.address) as link:
        path = await depot.fetch(link, order.payload.content)

    assert path.read_bytes() == BIG
    assert not part.exists()


async def test_a_right_beginning_is_not_fetched_again(
    serve: Serve, between: Between, connect: Connect, depot: Depot
) -> None:
    serving = serve()
    order, network = ask(serving), between(serving.address)
    (depot._folder / f"{order.payload.sha256.hex()}.part").write_bytes(BIG[: 5 * CHUNK + 99])
    async with connect(network.address) as link:
        path = await depot.fetch(link, order.payload.content)

    assert path.read_bytes() == BIG
    assert network.down < 2 * CHUNK


@pytest.mark.fault(12)
async def test_content_of_a_round_that_is_over_is_not_waited_for(serve: Serve, connect: Connect, depot: Depot) -> None:
    serving = serve()
    order = ask(serving)
    serving.call(serving.hub.end, order, "over")
    async with connect(serving.address) as link:
        with pytest.raises(Over, match="their round is over; wait for a new task"):
            await depot.fetch(link, order.payload.content)


@pytest.mark.parametrize("bad", ["bytes", "crc", "offset", "too many", "none"])
@pytest.mark.fault(20)
async def test_a_server_that_sends_wrong_bytes_gets_no_endless_loop(
    serve: Serve, connect: Connect, depot: Depot, bad: str
) -> None:
    asked, content = list[int](), b"what was announced"

    async def download(request: bytes, context: Any) -> None:
        offset = wire.DownloadRequest.FromString(request).offset
        asked.append(offset)
        data = {"bytes": bytes(len(content)), "too many": content * 2, "none": b""}.get(bad, content)[offset:]
        chunk = wire.Chunk(offset=offset + (bad == "offset"), data=data, crc32=zlib.crc32(data))
        chunk.crc32 ^= bad == "crc"
        await context.write(chunk.SerializeToString())

    serving = serve(service=lambda hub: Calls(hub, "Download", grpc.unary_stream_rpc_method_handler(download)))
    wanted = wire.Content(sha256=hashlib.sha256(content).digest(), total_bytes=len(content))
    async with connect(serving.address) as link:
        with pytest.raises(InvalidUpdate):
            await depot.fetch(link, wanted)

    assert len(asked) in (3, 4)
    assert not (depot._folder / wanted.sha256.hex()).exists()


@pytest.mark.parametrize(("code", "times"), [(Status.INTERNAL, 4), (Status.INVALID_ARGUMENT, 1)])
async def test_a_server_that_only_ever_fails_is_given_up(
    serve: Serve, connect: Connect, depot: Depot, code: grpc.StatusCode, times: int
) -> None:
    calls = list[str]()
    serving = serve(service=failing("Download", code, "the disk is broken", calls))
    order = ask(serving)
    async with connect(serving.address) as link:
        with pytest.raises(InvalidUpdate, match="the disk is broken"):
            await depot.fetch(link, order.payload.content)

    assert len(calls) == times


async def test_only_the_newest_contents_are_kept(serve: Serve, connect: Connect, depot: Depot) -> None:
    serving = serve()
    async with connect(serving.address) as link:
        for number in range(8):
            order = ask(serving, b"%d" % number)
            for age, path in enumerate(sorted(depot._folder.iterdir(), key=lambda path: path.stat().st_mtime)):
                os.utime(path, (age, age))
            await depot.fetch(link, order.payload.content)

    assert sorted(path.read_bytes() for path in depot._folder.iterdir()) == [b"4", b"5", b"6", b"7"]
    assert len(depot._turns) == 0


# --- to the server ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.fault(1, 5)
async def test_an_upload_goes_on_where_it_broke(
    serve: Serve, between: Between, connect: Connect, tmp_path: Path, seed: int
) -> None:
    serving = serve()
    ask(serving)
    (header, payload), network = answer(tmp_path), between(serving.address, cuts(4, seed))
    async with connect(network.address) as link:
        receipt = await deliver(link, (await link.offer()).nonce, header, payload)

    events = [serving.events.get_nowait() for _ in range(serving.events.qsize())]
    taken = [event for event in events if isinstance(event, Answered)]
    assert receipt.status in (wire.Receipt.ACCEPTED, wire.Receipt.DUPLICATE)
    assert [journal_of(serving).payload(event.nonce).read_bytes() for event in taken] == [payload.read_bytes()]
    assert network.broken == 4
    assert network.up < payload.stat().st_size + 3 * CHUNK


@pytest.mark.fault(6)
async def test_the_same_answer_twice_counts_once(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    serving, (header, payload) = serve(), answer(tmp_path)
    ask(serving)
    async with connect(serving.address) as link:
        nonce = (await link.offer()).nonce
        receipts = [await deliver(link, nonce, header, payload) for _ in range(2)]

    assert [receipt.status for receipt in receipts] == [wire.Receipt.ACCEPTED, wire.Receipt.DUPLICATE]


async def test_a_failure_needs_no_payload(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    serving, (header, _) = serve(), encode(Failure("a", 1, "no memory"))
    ask(serving)
    async with connect(serving.address) as link:
        receipt = await deliver(link, (await link.offer()).nonce, header, tmp_path / "there is none")

    assert receipt.status == wire.Receipt.ACCEPTED


@pytest.mark.fault(12)
async def test_an_answer_that_nobody_wants_any_more(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    serving, (header, payload) = serve(), answer(tmp_path)
    order = ask(serving)
    async with connect(serving.address) as link:
        nonce = (await link.offer()).nonce
        serving.call(serving.hub.end, order, "over")
        with pytest.raises(Over, match="needs no answer any more"):
            await deliver(link, nonce, header, payload)


async def test_an_answer_that_the_server_refuses_is_not_sent_again(
    serve: Serve, between: Between, connect: Connect, tmp_path: Path
) -> None:
    def check(client: str, content: str, header: bytes, payload: object) -> None:
        raise InvalidUpdate("the update is of another model")

    serving, (header, payload) = serve(), answer(tmp_path)
    network = between(serving.address)
    ask(serving, check=check)
    async with connect(network.address) as link:
        with pytest.raises(InvalidUpdate, match="the update is of another model"):
            await deliver(link, (await link.offer()).nonce, header, payload)

    assert network.up < CHUNK


@pytest.mark.fault(20)
async def test_an_answer_whose_bytes_were_damaged_on_disk_is_rejected(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    serving, (header, payload) = serve(), answer(tmp_path)
    payload.write_bytes(bytes(payload.stat().st_size))
    ask(serving)
    async with connect(serving.address) as link:
        receipt = await deliver(link, (await link.offer()).nonce, header, payload)

    assert receipt.status == wire.Receipt.REJECTED
    assert "its SHA-256 differs" in receipt.reason


@pytest.mark.parametrize("name", ["Begin", "Upload", "Commit"])
async def test_an_answer_that_the_server_only_ever_fails_on_is_given_up(
    serve: Serve, connect: Connect, tmp_path: Path, name: str
) -> None:
    calls, (header, payload) = list[str](), answer(tmp_path)
    serving = serve(service=failing(name, Status.INTERNAL, "the disk is broken", calls))
    ask(serving)
    async with connect(serving.address) as link:
        with pytest.raises(InvalidUpdate, match=r"the disk is broken|Internal error"):  # gRPC's, where it was sending
            await deliver(link, (await link.offer()).nonce, header, payload)

    assert len(calls) in (4, 5)
