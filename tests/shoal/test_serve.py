"""The same experiment with a server and clients that are processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import shoal
from shoal.audit import audit
from shoal.protos import registry
from shoal.split import split

if TYPE_CHECKING:
    from tests.shoal.conftest import Process, Start

CLIENTS = ["a", "b", "c"]
EXPERIMENT = """
name = "tiny"
rounds = {rounds}
cohort = 3
{more}
[data]
name = "csv"
path = "all.csv"
label = "y"
client = "site"
test_fraction = 0.2
client_test = 0.2
[model]
{model}
[local]
lr = 0.1
batch_size = 6
drop_last = true
[strategy]
name = "{strategy}"
[evaluation]
clients_every = {clients_every}
"""

# A client whose training waits at a gate: a pipe that the test opens. It has no optimizer of PyTorch's, the first of
# which takes each process a second.
GATED = """
import torch
import shoal

class Gated(shoal.Client):
    def fit(self, work):
        if work.client == "b" and work.round == 2:
            print("client b is at the gate", flush=True)
            open("gate").close()
        for x, y in work.batches():
            work.model.zero_grad()
            torch.nn.functional.cross_entropy(work.model(x), y).backward()
            work.correct(lr=0.1)
            with torch.no_grad():
                for weight in work.model.parameters():
                    weight -= 0.1 * weight.grad

class Broken(shoal.Client):
    def fit(self, work):
        if work.client == "b":
            raise KeyError("column 'age'")
        Gated().fit(work)
"""
GATE = 'client = "gated.py:Gated"'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a table of three sites and a shard file for each."""
    rng = np.random.default_rng(0)
    rows = [f"{rng.normal():.4f},{rng.normal():.4f},{rng.integers(2)},{site}" for site in CLIENTS for _ in range(20)]
    (tmp_path / "all.csv").write_text("u,v,y,site\n" + "\n".join(rows) + "\n")
    (tmp_path / "gated.py").write_text(GATED)
    os.mkfifo(tmp_path / "gate")
    return tmp_path


def write(place: Path, strategy: str = "fedavg", **changes: object) -> Path:
    path = place / f"{strategy}.toml"
    settings = {"rounds": 3, "model": 'name = "linear"', "clients_every": 2, "more": ""} | changes
    path.write_text(EXPERIMENT.format(strategy=strategy, **settings))
    return path


@pytest.fixture
def shards(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    split(write(place), [], place / "shards", replace=False)
    return place / "shards"


def serve(start: Start, *experiments: Path, wait_for: int = 3, more: tuple[str, ...] = ()) -> Process:
    listen = ("--listen", "127.0.0.1:0", "--insecure", "--heartbeat", 1, "--wait-for", wait_for)
    return start("server", *experiments, *listen, *more)


def join(start: Start, server: Process, shard: Path, *more: str) -> Process:
    state = ("--state", shard.parent / "state")
    return start("client", "--connect", server.address, "--insecure", "--data", shard, "--once", *state, *more)


def crowd(start: Start, server: Process, folder: Path, count: int = 3, *more: str) -> Process:
    host = ("--simulate", count, "--state", folder.parent / "hosted", "--workers", 1)
    return start("client", "--connect", server.address, "--insecure", "--data", folder, "--once", *host, *more)


def apart(shards: Path) -> Path:
    """The shard of b, for a process of its own: a crowd in the folder plays the others."""
    return (shards / "b.npz").rename(shards.parent / "b.npz")


def bits(run: shoal.Run) -> tuple[bytes, str, str]:
    """The final model and everything that was recorded but time."""
    timeless = [name for name in run.metrics.columns if "seconds" not in name]
    return run.parameters.trainable.numpy().tobytes(), run.metrics[timeless].to_csv(), run.clients.to_csv()


def simulated(path: Path, out: str = "simulated") -> shoal.Run:
    return shoal.Experiment.from_file(path).simulate(engine="lean", workers=0, out=out, progress="none")


@pytest.mark.slow
def test_every_strategy_ends_with_the_bits_of_a_simulation(start: Start, shards: Path) -> None:
    """Hosted and real clients are one population."""
    names = registry.names("shoal.strategies")
    files = [write(shards.parent, name, rounds=2, model='name = "mlp"\nnorm = true') for name in names]
    server = serve(start, *files)  # one after the other, on the same clients
    hosted = crowd(start, server, shards, 2, "--skip", "1")
    alone = join(start, server, shards / "a.npz")

    assert (server.wait(), hosted.wait(), alone.wait()) == (0, 0, 0), server.text
    for number, path in enumerate(files, 1):
        assert bits(shoal.Run(f"runs/{number}")) == bits(simulated(path)), path


@pytest.mark.slow
@pytest.mark.fault(2)
def test_a_client_killed_in_a_round_and_started_again_leaves_no_trace(start: Start, shards: Path) -> None:
    path = write(shards.parent, "scaffold", more=GATE)
    server, shard = serve(start, path), apart(shards)
    allowed = ("--allow", "gated.py:Gated")
    others = crowd(start, server, shards, 2, *allowed)
    killed = join(start, server, shard, *allowed)
    killed.wait_for("at the gate")
    killed.kill()
    server.wait_for("client 'b' left")
    again = join(start, server, shard, *allowed)
    again.wait_for("at the gate")
    (shards.parent / "gate").open("w").close()

    assert [process.wait() for process in (server, again, others)] == [0, 0, 0], server.text
    gate = os.open("gate", os.O_RDWR)  # opened at both ends: nobody waits there
    expected = simulated(path)
    os.close(gate)
    assert bits(shoal.Run("runs/1")) == bits(expected)
    assert shoal.Run("runs/1").failures.empty


@pytest.mark.slow
@pytest.mark.fault(24)
def test_a_client_that_never_answers_costs_one_deadline(start: Start, shards: Path) -> None:
    path = write(shards.parent, more=f"deadline = 8\nquorum = 0.6\n{GATE}", clients_every=0)
    server, shard = serve(start, path), apart(shards)
    allowed = ("--allow", "gated.py:Gated")
    hosted, hangs = crowd(start, server, shards, 2, *allowed), join(start, server, shard, *allowed)

    assert (server.wait(), hosted.wait(), hangs.wait()) == (0, 0, 0), server.text + hosted.text
    run = shoal.Run("runs/1")
    assert run.metrics["counted"].to_list()[1:3] == [3, 2]
    assert run.failures["reason"].to_list()[0] == "client 'b' did not answer before the deadline"
    assert 8 <= run.metrics["train_seconds"][2] < 16


@pytest.mark.slow
@pytest.mark.fault(26)
def test_a_server_that_is_stopped_ends_its_round_and_goes_on_later(start: Start, shards: Path) -> None:
    path = write(shards.parent, "scaffold", rounds=4, more=GATE)
    server = serve(start, path)
    hosted = crowd(start, server, shards, 3, "--allow", "gated.py:Gated")
    hosted.wait_for("at the gate")
    server.signal(signal.SIGTERM)
    server.wait_for("stopping after this round")
    (shards.parent / "gate").open("w").close()

    assert server.wait() == 130, server.text
    assert shoal.Run("runs/1").status == "interrupted"
    assert shoal.Run("runs/1").summary["rounds"] == 2
    resumed = start("resume", "runs/1")
    assert resumed.wait() == 0, resumed.text
    assert hosted.wait() == 0, hosted.text
    gate = os.open("gate", os.O_RDWR)
    expected = simulated(path)
    os.close(gate)
    assert bits(shoal.Run("runs/1")) == bits(expected)


@pytest.mark.slow
@pytest.mark.fault(23)
def test_a_clients_error_is_read_at_the_server(start: Start, shards: Path) -> None:
    path = write(shards.parent, rounds=1, more='quorum = 0.6\nclient = "gated.py:Broken"')
    server = serve(start, path)
    hosted = crowd(start, server, shards, 3, "--allow", "gated.py:Broken")

    assert (server.wait(), hosted.wait()) == (0, 0), server.text
    assert "client 'b' raised KeyError in round 1" in server.text
    assert "raise KeyError(\"column 'age'\")" in server.text
    assert shoal.Run("runs/1").metrics["counted"][1] == 2


@pytest.mark.slow
def test_code_that_the_owner_did_not_allow_is_not_run(start: Start, shards: Path) -> None:
    (shards.parent / "gated.py").write_text(GATED + "\nopen('was imported', 'w')\n")
    path = write(shards.parent, rounds=1, more=GATE)
    server = serve(start, path)
    (shards.parent / "was imported").unlink(missing_ok=True)  # by the server, which composed the experiment
    hosted = crowd(start, server, shards)

    assert server.wait() == 2
    assert "asks for 'gated.py:Gated', which the client's owner did not allow" in server.text
    assert "--allow gated.py:Gated" in server.text
    hosted.end()


@pytest.mark.slow
@pytest.mark.fault(3)
def test_a_server_killed_in_a_round_and_started_again_goes_on_with_it(start: Start, shards: Path) -> None:
    path = write(shards.parent, "scaffold", rounds=4, more=GATE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    command = ("server", path, "--listen", listen, "--insecure", "--heartbeat", 1)
    server = start(*command)
    clients = {name: join(start, server, shards / f"{name}.npz", "--allow", "gated.py:Gated") for name in CLIENTS}
    for name, words in {"a": "round 2: update delivered", "b": "at the gate", "c": "round 2: update delivered"}.items():
        clients[name].wait_for(words)
    twin = start(*command)
    assert twin.wait() == 2
    assert f"another server runs these experiments at {listen}" in twin.text
    server.kill()
    taken = list(Path("runs/0001-tiny/round").glob("*.payload"))
    again = start(*command)
    again.wait_for("going on with runs/0001-tiny after round 1")
    clients["b"].wait_for("connected", times=2)
    (shards.parent / "gate").open("w").close()

    assert [process.wait() for process in (again, *clients.values())] == [0, 0, 0, 0], again.text
    gate = os.open("gate", os.O_RDWR)
    expected = simulated(path)
    os.close(gate)
    assert bits(shoal.Run("runs/1")) == bits(expected)
    assert len(taken) == 2
    assert clients["a"].text.count("round 2: update delivered") == 1  # and was not asked for again
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["0001-tiny"]
    assert not Path("runs/0001-tiny/round").exists()


def audited(run: str) -> list[dict[str, Any]]:
    """What the audit log says, but for times, nonces and the chain over them."""
    own = ("time", "nonce", "previous")
    lines = [json.loads(line) for line in Path(run, "audit.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("sha256")
        line["clients"] = [{k: v for k, v in told.items() if k not in own} for told in line["clients"]]
    return [{k: v for k, v in line.items() if k not in own} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(300)  # five processes, on a machine that does other things too
def test_whenever_a_server_is_killed_the_audit_log_has_one_line_a_round(start: Start, shards: Path) -> None:
    path = write(shards.parent, "scaffold", clients_every=0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    command = ("server", path, path, "--listen", listen, "--insecure", "--heartbeat", 1)  # the second: undisturbed
    log, round = Path("runs/0001-tiny/audit.jsonl"), Path("runs/0001-tiny/round/journal.sqlite")
    amid = start(*command, until=("taken", 2))  # of three answers
    hosted = crowd(start, amid, shards)
    assert amid.wait() == -signal.SIGKILL, amid.text
    assert not log.exists()
    with closing(sqlite3.connect(round)) as journal:
        taken = [nonce for (nonce,) in journal.execute("SELECT nonce FROM task WHERE taken NOT NULL")]
    between = start(*command, until=("audited", 2))
    assert between.wait() == -signal.SIGKILL, between.text
    lines = log.read_bytes().splitlines()
    assert [path.name for path in Path("runs/0001-tiny/checkpoints").iterdir()] == ["round-00001"]
    assert audit(Path("runs/1")).problem is None  # the line that has no checkpoint yet is none
    last = start(*command)
    assert (last.wait(), hosted.wait()) == (0, 0), last.text

    assert audited("runs/0001-tiny") == audited("runs/0002-tiny")
    assert audit(Path("runs/1")).problem is None
    nonces = {told["nonce"] for told in json.loads(lines[0])["clients"]}
    assert len(taken) == 2 and set(taken) < nonces
    assert log.read_bytes().splitlines()[0] == lines[0]
    again = [json.loads(line)["clients"] for line in (lines[1], log.read_bytes().splitlines()[1])]
    assert again[0] == again[1]  # the same nonces, too
    kinds = [json.loads(line)["kind"] for line in Path("runs/0001-tiny/log.jsonl").read_text().splitlines()]
    told = [kind for kind in kinds if kind in ("resumed", "round")]
    assert told == ["resumed", "round", "round", "resumed", "round", "round"]  # the second one twice: it happened twice
