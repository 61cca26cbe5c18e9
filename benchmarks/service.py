"""What the gRPC service moves, beside a bare grpc.aio stream of chunks, in one run; and the memory that it takes.

    python benchmarks/service.py

Clients (a process of their own) upload updates of 10 MB that were made before. ``bare`` is a grpc.aio handler that
reads 1 MiB messages and drops them. ``shoal`` is the whole service: every header checked, every chunk's CRC-32 and the
payload's SHA-256 compared, written to a file, all values finite, then the round's sum in cohort order. It must be the
right one, else the benchmark fails. The two take turns; the median of the repetitions is given. Peak memory of the
server is read for rounds of 8, 32 and 128 clients (Linux only).
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
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import grpc
import numpy as np
import torch
from grpc import aio

from shoal import FedAvg
from shoal.client.link import Link
from shoal.client.transfer import deliver
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.messages import Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.protos.transport import CHANNEL, CHUNK, SERVER, Address
from shoal.server.fleet import Ask
from shoal.server.journal import Journal
from shoal.server.remote import RemoteFleet, Terms
from shoal.server.serving import Serving
from shoal.strategies.base import Context, vector
from shoal.strategies.sums import Carried, LeafSum

BARE = "/bare.Bare/Upload"
STATUS = Path("/proc/self/status")


def update_of(client: int, size: int) -> np.ndarray:
    return np.full(size, client + 1, np.float32)


# --- the clients' process --------------------------------------------------------------------------------------------


async def clients(bare: str, shoal: str, count: int, size: int) -> None:
    """Uploads to the bare server on demand, and answers every offer of the other."""
    with tempfile.TemporaryDirectory() as folder:
        links = [_link(shoal, number, size, Path(folder)) for number in range(count)]
        running = [asyncio.create_task(link.run(once=True, patience=60)) for link in links]
        channels = [aio.insecure_channel(bare, options=CHANNEL) for _ in range(count)]
        data = update_of(0, size).tobytes()
        while line := await asyncio.to_thread(sys.stdin.readline):
            began = time.perf_counter()
            if line.strip() == "bare":
                await asyncio.gather(*(channel.stream_unary(BARE)(_messages(data)) for channel in channels))
                print(time.perf_counter() - began, flush=True)
            else:
                await asyncio.gather(*running)
        for channel in channels:
            await channel.close()


def _link(server: str, number: int, size: int, folder: Path) -> Link:
    update = Update(update_of(number, size), 1.0, 1, 0.1)
    header, payload = encode(update)
    path, going = folder / str(number), set[asyncio.Task[Any]]()
    path.write_bytes(b"".join(payload))

    def heard(reply: wire.ConnectReply) -> None:
        if reply.HasField("offer"):
            going.add(task := asyncio.create_task(deliver(link, reply.offer.nonce, header, path)))
            task.add_done_callback(going.discard)

    link = Link(Address.parse(server), None, str(number), heard, lambda text: None)
    return link


async def _messages(data: bytes) -> AsyncIterator[Any]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


# --- the server's process --------------------------------------------------------------------------------------------


class Bare:
    """The least that gRPC can do."""

    def __init__(self) -> None:
        started: Future[int] = Future()
        Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True).start()
        self.address = f"127.0.0.1:{started.result()}"

    async def _serve(self, started: Future[int]) -> None:
        async def upload(requests: AsyncIterator[bytes], context: object) -> bytes:
            async for _ in requests:
                pass
            return b""

        server = aio.server(options=SERVER)
        handlers: dict[str, Any] = {"Upload": grpc.stream_unary_rpc_method_handler(upload)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", handlers),))
        started.set_result(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()


def measure(count: int, megabytes: int, repetitions: int) -> dict[str, Any]:
    """Seconds for all clients' updates, bare and through the service, and the server's peak memory."""
    size = megabytes * 10**6 // 4
    bare, volume = Bare(), count * size * 4 / 2**20
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Serving(Address("127.0.0.1", 0), None)) as serving,
    ):
        words = [sys.executable, __file__, "--clients", bare.address, str(serving.address), str(count), str(size)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            fleet = _fleet(serving, size, Journal(Path(folder) / "round"))
            assert process.stdin is not None and process.stdout is not None
            fleet.wait_for(count, lambda present: None, lambda: process.poll() is not None)
            times: dict[str, list[float]] = {"bare": [], "shoal": []}
            before = _peak()
            for round in range(1, repetitions + 2):  # the first one warms up
                print("bare", file=process.stdin, flush=True)
                times["bare"].append(float(process.stdout.readline()))
                times["shoal"].append(sum_of_round(fleet, round, count, size, count * (count + 1) / 2))
            peak = _peak()
            serving.close(finished=True)
            print("end", file=process.stdin, flush=True)
            process.stdin.close()
    seconds = {name: median(values[1:]) for name, values in times.items()}
    return {
        "clients": count,
        "megabytes": megabytes,
        "MiB_per_second": {name: volume / value for name, value in seconds.items()},
        "shoal_over_bare": median(b / s for b, s in zip(times["bare"][1:], times["shoal"][1:], strict=True)),
        "peak_MiB_above_idle": peak - before if peak and before else None,
    }


def _fleet(serving: Serving, size: int, journal: Journal) -> RemoteFleet:
    layout = Layout((Entry("w", Segment.TRAINABLE, "float32", (size,)),))
    initial = Parameters(layout, torch.zeros(size), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return RemoteFleet(serving, Terms("run", b"{}", FedAvg(weighting="uniform"), initial), journal)


def sum_of_round(fleet: RemoteFleet, number: int, count: int, size: int, expected: float) -> float:
    """The seconds of one round, from the question to a sum of which every element is as expected."""
    state = {"parameters": torch.zeros(size)}
    carried = Carried(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    ask = Ask([str(n) for n in range(count)], count, state, carried, Context(number, count, count))
    began, total = time.perf_counter(), LeafSum()
    for part in fleet.train(ask):
        assert not part.failures, part.failures
        total.add(part.position, part.total)
    summed = total.total()
    seconds = time.perf_counter() - began
    assert summed is not None
    assert torch.equal(vector(summed.terms, "delta"), torch.full((size,), expected))
    return seconds


def _peak() -> float | None:
    """The most MiB this process held since the last call; None where the system does not tell."""
    try:
        found = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        Path("/proc/self/clear_refs").write_text("5")
        return int(found[0].split()[1]) / 1024
    except OSError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/service.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clients:
        bare, shoal, count, size = options.clients
        asyncio.run(clients(bare, shoal, int(count), int(size)))
        return
    lines = [measure(count, options.megabytes, options.repetitions) for count in options.counts]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"load_average": os.getloadavg(), "lines": lines}, indent=2) + "\n")
    print(f"{'clients':>8}{'bare MiB/s':>12}{'shoal MiB/s':>13}{'shoal/bare':>12}{'peak MiB':>10}")
    for line in lines:
        speed = line["MiB_per_second"]
        peak = "" if line["peak_MiB_above_idle"] is None else f"{line['peak_MiB_above_idle']:.0f}"
        print(
            f"{line['clients']:>8}{speed['bare']:>12.0f}{speed['shoal']:>13.0f}{line['shoal_over_bare']:>12.2f}{peak:>10}"
        )


if __name__ == "__main__":
    main()
