"""A thousand clients at once, ten thousand that wait, a thousand rounds: what a server takes for them, on one machine.

    python benchmarks/load.py

*Busy*: clients of their own names and TCP connections, hosted by a few processes, all asked in each round; each fetches
a model of 10 MB and uploads an update of 10 MB. *Idle*: clients that are connected and give a sign of life every 30
seconds. Connections are counted in the system's table, control calls (Begin, and Commit, which waits until
the update is on the disk) are timed at the clients, memory and processor time are the server's. Linux
only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from benchmarks.service import sum_of_round, update_of
from shoal import FedAvg
from shoal.client.link import Link
from shoal.client.transfer import deliver
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import content_of, encode
from shoal.protos.messages import Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.protos.transport import Address
from shoal.server.journal import Journal
from shoal.server.remote import RemoteFleet, Terms
from shoal.server.serving import Serving

HOSTS = 4
STATUS = Path("/proc/self/status")


# --- the clients' processes ------------------------------------------------------------------------------------------


class Timed:
    """The calls of a link's stub, with the seconds that each took."""

    def __init__(self, stub: Any, seconds: dict[str, list[float]]) -> None:
        self._stub, self._seconds = stub, seconds
        self.Connect, self.Upload, self.Download = stub.Connect, stub.Upload, stub.Download

    async def Begin(self, request: wire.BeginRequest, **options: Any) -> Any:
        return await self._timed("Begin", request, options)

    async def Commit(self, request: wire.CommitRequest, **options: Any) -> Any:
        return await self._timed("Commit", request, options)

    async def _timed(self, name: str, request: Any, options: dict[str, Any]) -> Any:
        began = time.perf_counter()
        answer = await getattr(self._stub, name)(request, **options)
        self._seconds.setdefault(name, []).append(time.perf_counter() - began)
        return answer


class Client:
    """Fetches the model of each offer, compares its hash, and answers with the same bytes as all others."""

    def __init__(self, server: str, name: str, header: bytes, payload: Path, seconds: dict[str, list[float]]) -> None:
        self.link = Link(Address.parse(server), None, name, self._hear, lambda text: None)
        self.link.stub = Timed(self.link.stub, seconds)
        self._header, self._payload, self._going = header, payload, set[asyncio.Task[None]]()

    def _hear(self, reply: wire.ConnectReply) -> None:
        if reply.HasField("offer"):
            self.link.working = reply.offer.nonce
            self._going.add(task := asyncio.create_task(self._answer(reply.offer)))
            task.add_done_callback(self._going.discard)

    async def _answer(self, offer: wire.Offer) -> None:
        _, wanted, _ = content_of(offer.header)
        digest, request = sha256(), wire.DownloadRequest(session=await self.link.session(), sha256=wanted)
        async for chunk in self.link.stub.Download(request):
            digest.update(chunk.data)
        assert digest.digest() == wanted
        await deliver(self.link, offer.nonce, self._header, self._payload)


async def clients(server: str, first: int, count: int, size: int) -> None:
    """Until the server has finished; then the seconds of the control calls, as JSON."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        header, payload = encode(Update(update_of(0, size), 1.0, 1, 0.1))
        path = Path(folder) / "payload"
        path.write_bytes(b"".join(payload))
        made = [Client(server, str(number), header, path, seconds) for number in range(first, first + count)]
        await asyncio.gather(*(client.link.run(once=True, patience=600) for client in made))
    print(json.dumps(seconds), flush=True)


@contextmanager
def crowd(server: Address, count: int, size: int) -> Iterator[list[subprocess.Popen[str]]]:
    each = count // HOSTS
    words = [sys.executable, "-m", "benchmarks.load", "--clients", str(server)]
    hosts = [
        subprocess.Popen([*words, str(host * each), str(each), str(size)], stdout=subprocess.PIPE, text=True)
        for host in range(HOSTS)
    ]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.wait()


# --- the server's process --------------------------------------------------------------------------------------------


def busy(count: int, megabytes: int, rounds: int) -> dict[str, Any]:
    size = megabytes * 10**6 // 4
    with served(size) as (serving, fleet), crowd(serving.address, count, size) as hosts:
        fleet.wait_for(count, lambda present: None, lambda: any(host.poll() is not None for host in hosts))
        sockets, before, seconds = connections(serving.address.port), memory("VmRSS"), []
        for round in range(1, rounds + 1):
            seconds.append(sum_of_round(fleet, round, count, size, expected=count))
        peak = memory("VmHWM")
        serving.close(finished=True)
        calls: dict[str, list[float]] = {}
        for host in hosts:
            assert host.stdout is not None
            for name, found in json.loads(host.stdout.readline()).items():
                calls.setdefault(name, []).extend(found)
    return {
        "clients": count,
        "hosting_processes": HOSTS,
        "connections": sockets,
        "megabytes": megabytes,
        "rounds": rounds,
        "seconds_of_a_round": median(seconds),
        "p95_seconds": {name: quantiles(found, n=20)[-1] for name, found in calls.items()},
        "memory_idle_MiB": before,
        "memory_peak_MiB": peak,
    }


def idle(count: int, seconds: float) -> dict[str, Any]:
    with served(1) as (serving, fleet):
        before = memory("VmRSS")
        with crowd(serving.address, count, 1) as hosts:
            fleet.wait_for(count, lambda present: None, lambda: any(host.poll() is not None for host in hosts))
            sockets, after, began = connections(serving.address.port), memory("VmRSS"), os.times()
            time.sleep(seconds)
            ended = os.times()
            present = len(fleet.reachable)
    used = ended.user + ended.system - began.user - began.system
    return {
        "clients": count,
        "still_connected": present,
        "connections": sockets,
        "seconds": seconds,
        "processor": used / seconds,
        "processor_us_per_client_second": 1e6 * used / seconds / count,
        "memory_KiB_per_client": 1024 * (after - before) / count,
    }


def soak(rounds: int, count: int = 8, size: int = 100_000) -> dict[str, Any]:
    """Beginning with the second tenth: in the first, memory is still being taken that stays."""
    with served(size) as (serving, fleet), crowd(serving.address, count, size) as hosts:
        fleet.wait_for(count, lambda present: None, lambda: any(host.poll() is not None for host in hosts))
        lines = []
        for round in range(1, rounds + 1):
            sum_of_round(fleet, round, count, size, expected=count)
            if round % (rounds // 10) == 0:
                lines.append((round, memory("VmRSS"), len(list(Path("/proc/self/fd").iterdir()))))
        serving.close(finished=True)
    past, held, files = zip(*lines[1:], strict=True)
    slope = float(np.polyfit(past, held, 1)[0])
    return {"rounds": rounds, "clients": count, "MiB": held, "KiB_per_round": 1024 * slope, "open_files": files}


@contextmanager
def served(size: int) -> Iterator[tuple[Serving, RemoteFleet]]:
    layout = Layout((Entry("w", Segment.TRAINABLE, "float32", (size,)),))
    initial = Parameters(layout, torch.zeros(size), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Serving(Address("127.0.0.1", 0), None)) as serving,
        closing(Journal(Path(folder) / "round")) as journal,
    ):
        yield serving, RemoteFleet(serving, Terms("run", b"{}", FedAvg(weighting="uniform"), initial, 600.0), journal)


def connections(port: int) -> int:
    """Established TCP connections to this port, at the server's end."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                found += state == "01" and int(local.rpartition(":")[2], 16) == port
    return found


def memory(name: str) -> float:
    """MiB of this process, as Linux counts them."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--busy", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--soak", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/load.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if options.clients:
        server, first, count, size = options.clients
        asyncio.run(clients(server, int(first), int(count), int(size)))
        return
    found: dict[str, Any] = {"load_average": os.getloadavg()}
    if options.busy:
        found["busy"] = busy(options.busy, options.megabytes, options.rounds)
        print(json.dumps(found["busy"], indent=1), flush=True)
    if options.idle:
        found["idle"] = idle(options.idle, options.seconds)
        print(json.dumps(found["idle"], indent=1), flush=True)
    if options.soak:
        found["soak"] = soak(options.soak)
        print(json.dumps(found["soak"], indent=1), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
