"""A client's clock may say what it likes: it is not asked."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor

import shoal
from shoal.protos import fleet_pb2

if TYPE_CHECKING:
    from tests.shoal.conftest import Start

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
DURATIONS = {"Welcome.heartbeat", "Offer.lease"}  # seconds from now on, of the server's to the client
# The only other numbers that are not whole are what a client measured.
MEASURED = {"Number.real", "Setting.real"}
EXPERIMENT = """
name = "clocks"
rounds = 2
cohort = 3
[data]
name = "csv"
path = "all.csv"
label = "y"
client = "site"
[model]
name = "linear"
[strategy]
name = "scaffold"
"""


@pytest.mark.fault(13)
def test_no_time_of_day_crosses() -> None:
    """Every number that could be one, between clients and server, is the server's duration or a measurement."""
    real = {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}
    fields = {
        f"{message.name}.{field.name}": field.type
        for message in _messages(fleet_pb2.DESCRIPTOR.services_by_name["Fleet"])
        for field in message.fields
    }

    assert {name for name, kind in fields.items() if kind in real} == DURATIONS | MEASURED
    words = {word for name in fields for word in name.partition(".")[2].split("_")}
    assert not words & {"time", "date", "timestamp", "clock", "at", "now", "since", "until", "expires"}
    assert not [name for name in fleet_pb2.DESCRIPTOR.dependencies if "timestamp" in name.name]


def _messages(service: ServiceDescriptor) -> set[Descriptor]:
    """All that its calls carry, and the header that some of them carry as bytes."""
    found, waiting = set[Descriptor](), [fleet_pb2.Header.DESCRIPTOR]
    waiting += [message for method in service.methods for message in (method.input_type, method.output_type)]
    while waiting:
        message = waiting.pop()
        if message not in found:
            found.add(message)
            waiting += [field.message_type for field in message.fields if field.message_type is not None]
    return found


@pytest.mark.slow
@pytest.mark.fault(13)
@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed")
def test_clients_whose_clocks_are_wrong_count_as_any_other(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [f"{rng.normal():.4f},{rng.integers(2)},{site}" for site in "abc" for _ in range(12)]
    Path("all.csv").write_text("u,y,site\n" + "\n".join(rows) + "\n")
    Path("clocks.toml").write_text(EXPERIMENT)
    server = start("server", "clocks.toml", "--listen", "127.0.0.1:0", "--insecure", "--wait-for", 3)
    to = ("--connect", server.address, "--insecure", "--once", "--state", "state")
    clients = []
    for skew, whose in {"-1h": ("--simulate", 2), "+1y": ("--simulate", 1, "--skip", 2)}.items():
        with monkeypatch.context() as wrong:
            wrong.setenv("LD_PRELOAD", str(LIBRARIES[0]))
            wrong.setenv("FAKETIME", skew)
            wrong.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            told = subprocess.check_output([sys.executable, "-c", "import time; print(time.time())"])
            assert abs(float(told) - time.time()) > 3500
            clients.append(start("client", *to, "--data", "clocks.toml", *whose, "--workers", 1))
    run = shoal.Experiment.from_file("clocks.toml")

    assert [process.wait() for process in (server, *clients)] == [0, 0, 0], server.text
    simulated = run.simulate(engine="lean", workers=0, out="simulated", progress="none")
    served = shoal.Run("runs/1")
    assert served.failures.empty
    assert served.parameters.trainable.numpy().tobytes() == simulated.parameters.trainable.numpy().tobytes()
