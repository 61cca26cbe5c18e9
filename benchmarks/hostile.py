"""What attackers cost the others: the p95 of well-behaved clients' control calls beside each attack, in one run.

    python benchmarks/hostile.py

Twenty clients call Begin ten times a second; an attack runs beside them, with less right to the processors, as it would
come from other machines. Server, clients and attackers are a process each:

=============  ========================================================================================================
slow-loris     200 connections that say a byte of a request a second, and 200 more that say nothing
random bytes   connections that send a kilobyte of noise, one after the other
gzip bomb      Begin with a message that unpacks to 64 MiB of zeros
manifest       Begin with a header of a million tensors that are not there
stalled        uploads that stop after their first chunk, on as many connections as there are places
=============  ========================================================================================================
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc
import numpy as np
from grpc import aio

from shoal.client.link import Link
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.messages import Kind, Update
from shoal.protos.transport import CHUNK, SERVICE, Address, upload_request
from shoal.server.journal import Journal
from shoal.server.orders import Blob, Call, Order
from shoal.server.service import UPLOADS
from shoal.server.serving import Serving

CLIENTS, PAUSE = 20, 0.1
HEADER, BUFFERS = encode(Update(np.zeros(2**18, np.float32), 1))  # one chunk
ENOUGH = 20_000_000  # bytes of a message that claims a million tensors


async def connected(server: str, name: str) -> tuple[Link, wire.Offer]:
    """A client with a task."""
    offered: asyncio.Queue[wire.Offer] = asyncio.Queue()

    def heard(reply: wire.ConnectReply) -> None:
        if reply.HasField("offer"):
            offered.put_nowait(reply.offer)

    link = Link(Address.parse(server), None, name, heard, lambda text: None)
    link.going = asyncio.create_task(link.run(once=True, patience=30))  # type: ignore[attr-defined]
    offer = await offered.get()
    link.working = offer.nonce
    return link, offer


# --- well-behaved clients --------------------------------------------------------------------------------------------


async def behave(server: str, seconds: float) -> list[float]:
    """The seconds of each call."""
    found = list[float]()
    until = time.monotonic() + seconds

    async def one(name: str) -> None:
        link, offer = await connected(server, name)
        request = wire.BeginRequest(session=await link.session(), nonce=offer.nonce, header=HEADER)
        while time.monotonic() < until:
            began = time.perf_counter()
            await link.stub.Begin(request)
            found.append(time.perf_counter() - began)
            await asyncio.sleep(PAUSE)
        link.going.cancel()  # type: ignore[attr-defined]

    await asyncio.gather(*(one(f"good {number}") for number in range(CLIENTS)))
    return found


# --- attacks ---------------------------------------------------------------------------------------------------------


async def slow_loris(server: str) -> None:
    host, _, port = server.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9) * 100

    async def one(says: bytes) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        for byte in says:
            await asyncio.sleep(1)
            writer.write(bytes([byte]))
        await asyncio.sleep(3600)

    await asyncio.gather(*(one(preface if number % 2 else b"") for number in range(400)), return_exceptions=True)


async def random_bytes(server: str) -> None:
    host, _, port = server.rpartition(":")
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(os.urandom(1024))
            await asyncio.wait_for(reader.read(), 1)
            writer.close()


async def gzip_bomb(server: str) -> None:
    await _calls(server, "Begin", bytes(64 * 2**20), compression=grpc.Compression.Gzip)


async def manifest(server: str) -> None:
    header = wire.Header()
    header.manifest.tensors.extend([wire.Tensor()] * 1_000_000)
    header.update.SetInParent()
    await _calls(server, "Begin", wire.BeginRequest(session="", nonce="", header=header.SerializeToString()[:ENOUGH]))


async def _calls(server: str, name: str, request: Any, **options: Any) -> None:
    """The same call again and again; what it is answered with does not matter."""
    limits = [("grpc.max_send_message_length", -1)]
    async with aio.insecure_channel(server, options=limits) as channel:
        serialize: Any = bytes if isinstance(request, bytes) else type(request).SerializeToString
        call: Any = channel.unary_unary(f"/{SERVICE}/{name}", request_serializer=serialize)
        while True:
            with suppress(aio.AioRpcError):
                await call(request, timeout=10, **options)


async def stalled(server: str) -> None:
    async def one(name: str) -> None:
        link, offer = await connected(server, name)
        session = await link.session()
        await link.stub.Begin(wire.BeginRequest(session=session, nonce=offer.nonce, header=HEADER))
        call = link.stub.Upload()
        await call.write(upload_request(session, offer.nonce, 0, memoryview(bytes(CHUNK // 2))))
        await asyncio.sleep(3600)

    await asyncio.gather(*(one(f"bad {number}") for number in range(2 * UPLOADS)))


ATTACKS: dict[str, Callable[[str], Awaitable[None]]] = {
    "slow-loris": slow_loris,
    "random bytes": random_bytes,
    "gzip bomb": gzip_bomb,
    "manifest": manifest,
    "stalled": stalled,
}


async def _attack(name: str, server: str) -> None:
    await ATTACKS[name](server)


# --- the server ------------------------------------------------------------------------------------------------------


def measure(attack: str | None, seconds: float) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Serving(Address("127.0.0.1", 0), None)) as serving,
        closing(Journal(Path(folder) / "round")) as journal,
    ):
        names = [f"good {n}" for n in range(CLIENTS)] + [f"bad {n}" for n in range(2 * UPLOADS)]
        asked = journal.open(1, Kind.TRAIN, names, len(names))
        order = Order("run", 1, Blob.of(b"{}"), b"a task", Blob.of(b""), lambda *answer: None, journal, 600.0)
        calls = [Call(nonce, name) for nonce, name in zip(asked.nonces, names, strict=True)]
        serving.call(serving.hub.ask, order, calls)
        words = [
            sys.executable,
            "-m",
            "benchmarks.hostile",
            "--against",
            str(serving.address),
            "--seconds",
            str(seconds),
        ]
        attacker = None if attack is None else subprocess.Popen([*words, "--attack", attack], stderr=subprocess.DEVNULL)
        try:
            said = subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout
        finally:
            if attacker is not None:
                attacker.kill()
                attacker.wait()
    found = json.loads(said)
    return {"calls": len(found), "median_ms": 1e3 * median(found), "p95_ms": 1e3 * quantiles(found, n=20)[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hostile.json"))
    options = parser.parse_args()
    if options.attack:
        os.nice(10)
        asyncio.run(_attack(options.attack, options.against))
        return
    if options.against:
        print(json.dumps(asyncio.run(behave(options.against, options.seconds))))
        return
    lines: dict[str, dict[str, float]] = {}
    for attack in (None, *ATTACKS, None):  # nobody at both ends: what the machine does by itself
        name = attack or ("nobody" if not lines else "nobody, again")
        lines[name] = measure(attack, options.seconds)
        times = lines[name]["p95_ms"] / lines["nobody"]["p95_ms"]
        print(
            f"{name:15}{lines[name]['median_ms']:8.2f} ms{lines[name]['p95_ms']:8.2f} ms p95  × {times:.2f}", flush=True
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"load_average": os.getloadavg(), "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
