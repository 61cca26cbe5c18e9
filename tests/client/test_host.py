"""A client as a whole, in this process, with its real training process and a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np
import pytest

from shoal.client.host import Settings, host
from shoal.client.models import linear
from shoal.client.net import build_module, parameters_of, to_numpy
from shoal.client.store import Store
from shoal.protos import fleet_pb2 as wire
from shoal.protos.assignment import Assignment
from shoal.protos.codec import content_of, decode_failure, encode
from shoal.protos.errors import ConnectionRefused
from shoal.protos.experiment import Component
from shoal.protos.messages import Kind, Task, Update
from shoal.protos.transport import Address
from shoal.server.orders import Answered, Blob, Failed, Order
from shoal.server.serving import Serving
from tests.server.asking import call, journal_of

if TYPE_CHECKING:
    from tests.client.conftest import Serve

pytestmark = pytest.mark.slow
E = TypeVar("E")
MINE = """
import os
import shoal

class Leaves(shoal.Client):
    def fit(self, work):
        os._exit(3)
"""
Join = Callable[..., Any]
Asked = tuple[bytes, bytes, bytes]  # an assignment, a task's header and payload


@pytest.fixture
def take_part(tmp_path: Path) -> Join:
    """``async with take_part(address)``: client a of a shard of two examples, and what it says."""
    np.savez(tmp_path / "a.npz", x=np.eye(2, 4, dtype="f4"), y=[0, 1])

    @asynccontextmanager
    async def make(address: Address, **changes: Any) -> AsyncIterator[asyncio.Queue[str]]:
        said: asyncio.Queue[str] = asyncio.Queue()
        clients = {"a": {"path": str(tmp_path / "a.npz")}}

        def note(client: str, text: str) -> None:
            said.put_nowait(text)

        running = asyncio.create_task(host(Settings(address, tmp_path, clients, note=note, **changes)))
        yield said
        running.cancel()
        await asyncio.wait([running])

    return make


def a_task(client: str | None = None) -> Asked:
    """To train a linear model in round 3, with a class of the user's ``mine.py`` if one is named."""
    shape: dict[str, Any] = {"shape": [4], "classes": 2}
    own = None if client is None else Component(name=f"elsewhere/mine.py:{client}")
    strategy, named = Component(name="fedavg"), Component(name="linear", **shape)
    assignment = Assignment(strategy=strategy, model=named, client=own, local={}, seed=0, dtype="float32")
    model = parameters_of(build_module(lambda: linear((4,), 2), 0, "float32")).map(to_numpy)
    header, payload = encode(Task(Kind.TRAIN, 3, 2, model))
    return assignment.encode(), header, b"".join(payload)


def ask(serving: Serving, task: Asked) -> str:
    """The task's nonce."""
    assignment, header, payload = task
    blob = Blob(content_of(header)[1], [memoryview(payload)])
    order = Order("run", 3, Blob.of(assignment), header, blob, lambda *answer: None, journal_of(serving), 60.0)
    return call(serving, order, {"a": 0})["a"]


async def event(serving: Serving, kind: type[E]) -> E:
    while True:
        found = await asyncio.to_thread(serving.events.get, timeout=30)
        if isinstance(found, kind):
            return found


@pytest.mark.fault(23)
async def test_a_process_that_dies_over_a_task_is_the_clients_failure(
    serve: Serve, take_part: Join, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    serving = serve()
    nonce = ask(serving, a_task("Leaves"))
    async with take_part(serving.address, allow=(f"{tmp_path / 'mine.py'}:Leaves",)):
        failed = await event(serving, Failed)

    assert (failed.nonce, failed.failure.client, failed.failure.round) == (nonce, "a", 3)
    assert failed.failure.reason.startswith("client 'a' lost the process that trained it (exit code 3); ")


@pytest.mark.fault(1)
async def test_an_answer_that_was_ready_before_a_restart_is_delivered_as_it_was(
    serve: Serve, take_part: Join, tmp_path: Path
) -> None:
    serving, store = serve(), Store(tmp_path, "a")
    store.claim()
    header, payload = encode(Update(np.full(10, 7.0, np.float32), 1))
    store.outbox.put(ask(serving, a_task()), header, payload)
    store.close()
    async with take_part(serving.address):
        answered = await event(serving, Answered)

    assert answered.header == header
    assert journal_of(serving).payload(answered.nonce).read_bytes() == np.full(10, 7.0, np.float32).tobytes()


async def test_names_of_tasks_and_runs_never_become_other_files(serve: Serve, take_part: Join, tmp_path: Path) -> None:
    begun, (_, header, _) = asyncio.Queue[bytes](), a_task()
    loop = asyncio.get_running_loop()

    class Hostile(grpc.GenericRpcHandler):
        async def connect(self, requests: Any, context: Any) -> AsyncIterator[wire.ConnectReply]:
            await anext(requests)
            yield wire.ConnectReply(welcome=wire.Welcome(version=1, session="s", heartbeat=30.0))
            yield wire.ConnectReply(offer=wire.Offer(nonce="../../escaped", run="run", header=header))
            yield wire.ConnectReply(offer=wire.Offer(nonce="n", run="../../escaped", header=header))
            await asyncio.Event().wait()

        async def begin(self, request: bytes, context: Any) -> None:
            loop.call_soon_threadsafe(begun.put_nowait, wire.BeginRequest.FromString(request).header)
            await context.abort(grpc.StatusCode.NOT_FOUND, "over")

        def service(self, details: Any) -> Any:
            if details.method.endswith("Begin"):
                return grpc.unary_unary_rpc_method_handler(self.begin)
            return grpc.stream_stream_rpc_method_handler(
                self.connect, wire.ConnectRequest.FromString, wire.ConnectReply.SerializeToString
            )

    async with take_part(serve(service=lambda hub: Hostile()).address) as said:
        told = decode_failure(await begun.get()).reason
        while "answer not taken" not in await said.get():
            pass

    assert "is no name of a task or a run; is this a Shoal server?" in told
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]


async def test_of_many_clients_one_that_is_taken_frees_the_others(serve: Serve, tmp_path: Path) -> None:
    taken, free = Store(tmp_path, "b"), Store(tmp_path, "a")
    taken.claim()
    with pytest.raises(ConnectionRefused, match="another process is client 'b'"):
        await host(Settings(serve().address, tmp_path, {"a": {}, "b": {}}))
    free.claim()
    free.close()
    taken.close()
