"""Hundreds of rounds in one server process: its memory stays where it was. (``benchmarks/load.py`` does a thousand.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.protos import fleet_pb2 as wire
from tests.server.conftest import Peer
from tests.server.test_remote import an_update

ROOT = Path(__file__).parents[2]
WARM, MORE = 100, 200  # rounds
SERVER = f"""
import pathlib, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from shoal.protos.transport import Address
from shoal.server.journal import Journal
from shoal.server.serving import Serving
from tests.server.test_remote import House, an_ask

def resident():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024

with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
    serving = Serving(Address("127.0.0.1", 0), None)
    house = House(serving, pool, Journal(pathlib.Path(folder)))
    print(serving.address, flush=True)
    for number in range(1, {WARM + MORE} + 1):
        parts = house.train(an_ask(["a", "b"], number)).result(60)
        assert sum(len(part.reports) for part in parts) == 2
        if number == {WARM}:
            before = resident()
    print(resident() - before, flush=True)
    house.fleet.close()
    serving.close()
"""


@pytest.mark.slow
@pytest.mark.fault(25)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_rounds() -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SERVER}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            peers = [Peer(address, name, None) for name in "ab"]
            for peer in peers:
                peer.welcome()
            for number in range(WARM + MORE):
                for peer in peers:
                    receipt = peer.answer(peer.hear("offer").nonce, an_update(number % 50))
                    assert receipt.status == wire.Receipt.ACCEPTED
            grown = int(server.stdout.readline())
            for peer in peers:
                peer.close()
        except BaseException:
            server.kill()
            raise

    assert grown < MORE * 10_000  # bytes
