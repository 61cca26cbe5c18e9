"""Messages that are larger than they may be, or than they say: refused, and the server's process stays small."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.messages import Update
from shoal.protos.transport import CHUNK, SERVICE
from tests.server.conftest import Peer
from tests.server.test_remote import an_update

ROOT = Path(__file__).parents[2]
WAIT = 30.0
MB = 2**20
BOMB = 64 * MB  # of zeros: some tens of kilobytes when packed
CLIENTS = ["bomb", "claims", "more", "good"]
SERVER = f"""
import json, pathlib, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from shoal.protos.transport import Address
from shoal.server.journal import Journal
from shoal.server.serving import Serving
from tests.server.test_remote import House, an_ask, failures

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
    serving = Serving(Address("127.0.0.1", 0), None)
    house = House(serving, pool, Journal(pathlib.Path(folder)))
    round = house.train(an_ask({CLIENTS}))
    print(serving.address, flush=True)
    sys.stdin.readline()
    before = peak()
    parts = round.result(100)
    print(json.dumps([peak() - before, [failure.client for failure in failures(parts)]]), flush=True)
    house.fleet.close()
    serving.close()
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault(10),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A round for four clients, in a process of its own; it is killed where the test fails."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SERVER}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        except BaseException:
            process.kill()
            raise


def bombs(address: str) -> Iterator[grpc.StatusCode]:
    """How calls end whose message is small on the wire and large behind it."""
    kinds = {"Begin": "unary_unary", "Commit": "unary_unary", "Upload": "stream_unary", "Connect": "stream_stream"}
    for name, kind in kinds.items():
        message = bytes(BOMB) if kind == "unary_unary" else iter([bytes(BOMB)])
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(address, options=options, compression=grpc.Compression.Gzip) as channel:
            call: Any = getattr(channel, kind)(f"/{SERVICE}/{name}")
            yield _code(lambda call=call, message=message: _heard(call(message, timeout=WAIT)))


def _heard(reply: Any) -> None:
    """To its end, if it is a stream."""
    if not isinstance(reply, bytes):
        list(reply)


def _code(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code


def claimed(elements: int) -> bytes:
    """The header of an update that says it has a delta of so many numbers."""
    header = wire.Header.FromString(encode(Update(np.zeros(5, "float32"), 1))[0])
    (tensor,) = header.manifest.tensors
    tensor.shape[:], tensor.nbytes, header.manifest.total_bytes = [elements], 4 * elements, 4 * elements
    return header.SerializeToString()


def test_nothing_that_is_too_large_is_taken_into_memory() -> None:
    with server() as (address, process):
        peers = {name: Peer(address, name, None) for name in CLIENTS}
        for peer in peers.values():
            peer.welcome()
        nonces = {name: peer.hear("offer").nonce for name, peer in peers.items()}
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()

        assert set(bombs(address)) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        terabyte = _code(lambda: peers["claims"].begin(nonces["claims"], claimed(2**38)))
        header, _ = encode(an_update(0))
        offset = peers["more"].begin(nonces["more"], header)
        flood = [peers["more"].piece(nonces["more"], offset, bytes(CHUNK))] * 100
        more = _code(lambda: peers["more"].send(flood))
        for name in ("more", "bomb", "good"):
            assert peers[name].answer(nonces[name], an_update(0)).status == wire.Receipt.ACCEPTED
        grown, failed = json.loads(process.stdout.readline())
        for peer in peers.values():
            peer.close()

    assert (terabyte, more, failed) == (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED, ["claims"])
    assert grown < 48 * MB
