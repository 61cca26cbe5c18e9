"""What no client of ours would send: damaged messages in any number, and many clients at once."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.messages import Update
from shoal.protos.transport import CHUNK, SERVICE
from shoal.server.orders import Blob, Order
from tests.server.asking import call, journal_of

if TYPE_CHECKING:
    from shoal.server.serving import Serving
    from tests.server.conftest import Join, Peer, Serve

WAIT = 10.0
HEADER, BUFFERS = encode(Update(np.zeros(4), 1))
EXPECTED = {
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND),
    *(grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED),
}
fuzzing = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def an_order(serving: Serving, size: int) -> Order:
    def check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
        return

    return Order("run", 1, Blob.of(b"{}"), b"a task", Blob.of(bytes(size)), check, journal_of(serving), lease=60.0)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a message with a piece cut out, put in or changed."""
    at, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    return data[:at] + draw(st.binary(max_size=12)) + data[end if draw(st.booleans()) else at :]


def ended(call: Callable[[], Any]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.slow
@pytest.mark.fault(19)
def test_damaged_messages_get_a_status_and_the_server_serves_on(serve: Serve, join: Join) -> None:
    serving = serve()
    peer = join(serving)

    @fuzzing
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        order = an_order(serving, CHUNK)
        nonce = call(serving, order, {"a": 0})["a"]
        codes = {ended(call) for call in _calls(peer, nonce, order, lambda message: data.draw(mutated(message)))}
        serving.call(serving.hub.end, order, "over")

        assert codes <= EXPECTED | {grpc.StatusCode.OK}

    fuzz()
    peer.beat()
    order = an_order(serving, 1)
    nonce = call(serving, order, {"a": 0})["a"]
    assert peer.answer(nonce, Update(np.zeros(4), 1)).status == wire.Receipt.ACCEPTED


def _calls(peer: Peer, nonce: str, order: Order, damage: Callable[[bytes], bytes]) -> list[Callable[[], Any]]:
    """Every call of an answer in its order, each with a damaged message."""
    channel: Any = peer.channel
    payload = b"".join(BUFFERS)
    hello = wire.ConnectRequest(hello=wire.Hello(versions=[1], client="b", instance="one")).SerializeToString()
    beat = wire.ConnectRequest(heartbeat=wire.Heartbeat(nonce=nonce)).SerializeToString()
    download = wire.DownloadRequest(session=peer.session, sha256=order.payload.sha256).SerializeToString()
    begin = wire.BeginRequest(session=peer.session, nonce=nonce, header=HEADER)
    header = wire.BeginRequest(session=peer.session, nonce=nonce, header=damage(HEADER))
    half = peer.piece(nonce, 0, payload[:16]).SerializeToString()
    rest = peer.piece(nonce, 16, payload[16:]).SerializeToString()
    commit = wire.CommitRequest(session=peer.session, nonce=nonce).SerializeToString()

    def connect(*messages: bytes) -> None:
        list(channel.stream_stream(f"/{SERVICE}/Connect")(iter(messages), timeout=WAIT))

    def upload(*messages: bytes) -> None:
        channel.stream_unary(f"/{SERVICE}/Upload")(iter(messages), timeout=WAIT)

    def unary(rpc: str, message: bytes) -> None:
        channel.unary_unary(f"/{SERVICE}/{rpc}")(message, timeout=WAIT)

    return [
        lambda: connect(damage(hello)),
        lambda: connect(hello, damage(beat), damage(beat)),
        lambda: list(channel.unary_stream(f"/{SERVICE}/Download")(damage(download), timeout=WAIT)),
        lambda: unary("Begin", damage(begin.SerializeToString())),
        lambda: peer.stub.Begin(begin, timeout=WAIT),
        lambda: upload(damage(half)),
        lambda: upload(half, damage(rest)),
        lambda: unary("Commit", damage(commit)),
        lambda: peer.stub.Begin(header, timeout=WAIT),
        lambda: unary("Commit", commit),
    ]


@pytest.mark.slow
@pytest.mark.fault(5)
def test_a_client_that_hangs_up_anywhere_leaves_no_trace(serve: Serve, join: Join, errors: list[str]) -> None:
    """Also not in the log: a handler that is cancelled is none that raised."""
    serving = serve()
    peer = join(serving)
    order = an_order(serving, 8 * CHUNK)
    nonce = call(serving, order, {"a": 0})["a"]
    header, buffers = encode(Update(np.zeros(2**19), 1))
    payload = b"".join(buffers)
    for round in range(20):
        download: Any = peer.stub.Download(
            wire.DownloadRequest(session=peer.session, sha256=order.payload.sha256, offset=round)
        )
        next(download)
        begun = peer.begin(nonce, header)
        upload: Any = peer.stub.Upload.future(
            iter([peer.piece(nonce, at, payload[at : at + 65536]) for at in range(begun, len(payload), 65536)])
        )
        other = join(serving, f"b{round}")
        other.leave()
        download.cancel()
        upload.cancel()
    gc.collect()  # a task that nobody waited for is complained of when it goes

    assert peer.answer(nonce, Update(np.zeros(2**19), 1)).status == wire.Receipt.ACCEPTED
    assert errors == []


CROWD = 100
MEASURED = f"""
import json, pathlib, sys, tempfile
from shoal.protos.messages import Kind
from shoal.protos.transport import Address
from shoal.server.journal import Journal
from shoal.server.orders import Answered, Blob, Call, Order
from shoal.server.serving import Serving

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

with tempfile.TemporaryDirectory() as folder:
    serving = Serving(Address("127.0.0.1", 0), None)
    journal, names = Journal(pathlib.Path(folder)), [str(number) for number in range({CROWD})]
    order = Order("run", 1, Blob.of(b"{{}}"), b"a task", Blob.of(b""), lambda *_: None, journal, lease=60.0)
    nonces = dict(zip(names, journal.open(1, Kind.TRAIN, names, {CROWD}).nonces))
    serving.call(serving.hub.ask, order, [Call(nonce, name) for name, nonce in nonces.items()])
    print(json.dumps([str(serving.address), nonces]), flush=True)
    sys.stdin.readline()
    before, taken = peak(), 0
    while taken < {CROWD}:
        taken += isinstance(serving.events.get(), Answered)
    print(peak() - before, flush=True)
    serving.close()
"""


@contextmanager
def _killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """Where the test fails, whatever it is waiting for."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.fault(10, 16)
def test_memory_does_not_grow_with_the_bytes_of_all_clients() -> None:
    from tests.server.conftest import Peer as Client

    command = [sys.executable, "-c", MEASURED]
    header, buffers = encode(Update(np.zeros(2**20), 1))
    payload = b"".join(buffers)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server, _killed(server):
        assert server.stdin is not None and server.stdout is not None
        address, nonces = json.loads(server.stdout.readline())
        peers = [Client(address, name, None) for name in nonces]
        for peer in peers:
            peer.welcome()
        server.stdin.write("go\n")
        server.stdin.flush()

        def answer(peer: Client) -> wire.Receipt:
            nonce = nonces[peer.client]
            peer.begin(nonce, header)
            peer.upload(nonce, payload)
            return peer.commit(nonce)

        with ThreadPoolExecutor(len(peers)) as pool:
            assert {receipt.status for receipt in pool.map(answer, peers)} == {wire.Receipt.ACCEPTED}
        grown = int(server.stdout.readline())
        for peer in peers:
            peer.close()

    assert grown < CROWD * len(payload) / 3
