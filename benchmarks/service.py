"""What the gRPC service moves, beside a bare grpc.aio stream of chunks and beside the disk, in one run.

    python benchmarks/service.py

Clients (a process of their own) upload updates of 10 MB that were made before. ``bare`` is a grpc.aio handler that
reads 1 MiB messages and drops them; ``disk`` writes the same bytes to a file for each client and syncs it. ``durable``
is the whole service: every header checked, every chunk's CRC-32 and the payload's SHA-256 compared, written to a file,
all values finite, synced, in the journal, then the round's sum in cohort order. ``memory`` is the same with the journal
in memory, unsynced. Sums must be the right ones, else the benchmark fails. All take turns; medians of the repetitions
are given, with the processor time of both processes, which other work on the machine changes less. Peak memory of the
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
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
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
from shoal.protos.files import write_synced
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
MEMORY = Path("/dev/shm")  # on Linux


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
            if line.strip() == "bare":
                await asyncio.gather(*(channel.stream_unary(BARE)(_messages(data)) for channel in channels))
            elif line.strip() == "end":
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
            print(time.process_time(), flush=True)
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


class Clock:
    """Seconds, and processor seconds of this process and of the clients', of each repetition of each kind of work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.times: dict[str, list[tuple[float, float, float]]] = {}

    def tell(self, word: str) -> float:
        """Have the clients do something; the processor seconds that they have taken when it is done."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(word, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def time(self, kind: str, work: Callable[[], object]) -> None:
        before = time.perf_counter(), time.process_time(), self.tell("cpu")
        work()
        after = time.perf_counter(), time.process_time(), self.tell("cpu")
        self.times.setdefault(kind, []).append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))

    def seconds(self, kind: str) -> list[float]:
        """Without the first one, which warms up."""
        return [wall for wall, _, _ in self.times[kind][1:]]

    def processor(self, kind: str, volume: float) -> dict[str, float]:
        """Milliseconds a MiB."""
        server, clients = (median(time[place] for time in self.times[kind][1:]) for place in (1, 2))
        return {"server": 1e3 * server / volume, "clients": 1e3 * clients / volume}


def measure(count: int, megabytes: int, repetitions: int, where: Path) -> dict[str, Any]:
    """What moves all clients' updates in each way, at which cost, and the server's peak memory."""
    size = megabytes * 10**6 // 4
    bare, volume = Bare(), count * size * 4 / 2**20
    with (
        tempfile.TemporaryDirectory(dir=where) as folder,
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as memory,
        closing(Serving(Address("127.0.0.1", 0), None)) as serving,
    ):
        words = [sys.executable, __file__, "--clients", bare.address, str(serving.address), str(count), str(size)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            fleets = {
                "memory": _fleet(serving, size, Journal(Path(memory) / "round", sync=False)),
                "durable": _fleet(serving, size, Journal(Path(folder) / "round")),
            }
            fleets["durable"].wait_for(count, lambda present: None, lambda: process.poll() is not None)
            clock, before = Clock(process), _peak()
            for round in range(1, repetitions + 2):
                clock.time("bare", lambda: clock.tell("bare"))
                clock.time("disk", lambda: _write(Path(folder), count, size))
                for kind, fleet in fleets.items():
                    clock.time(kind, partial(sum_of_round, fleet, round, count, size, count * (count + 1) / 2))
            peak = _peak()
            clock.tell("end")
    floor = [max(pair) for pair in zip(clock.seconds("bare"), clock.seconds("disk"), strict=True)]
    return {
        "clients": count,
        "megabytes": megabytes,
        "MiB_per_second": {kind: volume / median(clock.seconds(kind)) for kind in clock.times},
        "processor_ms_per_MiB": {kind: clock.processor(kind, volume) for kind in clock.times},
        "memory_over_bare": _ratio(clock.seconds("bare"), clock.seconds("memory")),
        "durable_over_floor": _ratio(floor, clock.seconds("durable")),
        "peak_MiB_above_idle": peak - before if peak and before else None,
    }


def _ratio(floor: Sequence[float], ours: Sequence[float]) -> float:
    return median(f / o for f, o in zip(floor, ours, strict=True))


def _write(folder: Path, count: int, size: int) -> None:
    """The least that a disk can do: the same bytes in as many files, each synced."""
    data = update_of(0, size).tobytes()
    for number in range(count):
        write_synced(folder / f"bare {number}", [data])
        (folder / f"bare {number}").unlink()


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
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to use")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/service.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clients:
        bare, shoal, count, size = options.clients
        asyncio.run(clients(bare, shoal, int(count), int(size)))
        return
    lines = [measure(count, options.megabytes, options.repetitions, options.where) for count in options.counts]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"load_average": os.getloadavg(), "lines": lines}, indent=2) + "\n")
    for line in lines:
        _show(line)


def _show(line: Mapping[str, Any]) -> None:
    peak = line["peak_MiB_above_idle"]
    print(f"{line['clients']} clients × {line['megabytes']} MB" + ("" if peak is None else f", peak {peak:.0f} MiB"))
    for kind, speed in line["MiB_per_second"].items():
        cost = line["processor_ms_per_MiB"][kind]
        print(f"  {kind:8}{speed:6.0f} MiB/s   server {cost['server']:.2f}, clients {cost['clients']:.2f} ms/MiB")
    print(f"  memory/bare {line['memory_over_bare']:.2f}, durable/min(bare, disk) {line['durable_over_floor']:.2f}")


if __name__ == "__main__":
    main()
