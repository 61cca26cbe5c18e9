"""The simulated fleet under failures: real worker processes that raise, hang and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal import Client, Experiment, LocalTraining, Run, Scaffold, Work
from shoal.client.data import Shard
from shoal.compose import Composition
from shoal.memory import memory_mb
from shoal.protos.errors import ExperimentError, RoundError
from shoal.simulations import fleet as fleets
from shoal.simulations.federated import ArrayData, LazyData, Numbered
from shoal.simulations.fleet import SimulatedFleet
from shoal.simulations.states import ClientStates

N = 40


class Troubled(Client):
    """Trains one step; the clients named in ``acts`` do something else instead."""

    def __init__(self, acts: Mapping[str, str]) -> None:
        self.acts = acts

    def fit(self, work: Work) -> Mapping[str, float] | None:
        act = self.acts.get(work.client)
        if act == "raise":
            raise ValueError("my data is cursed")
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "exit":
            os._exit(3)
        if act == "hang":
            signal.pause()
        if act == "ask":
            input("to standard input, which is the pipe of a worker")
        if act == "nan":
            next(work.model.parameters()).data.fill_(torch.nan)
            return None
        if act == "nan metric":
            return {"mine": float("nan")}
        if act == "print":
            print("to standard output, which is the pipe of a worker")
        # Without an optimizer of PyTorch's, the first of which takes each process a second.
        work.model.zero_grad()
        nn.functional.cross_entropy(work.model(work.data.x), work.data.y).backward()
        work.correct(lr=0.1)
        with torch.no_grad():
            for weight in work.model.parameters():
                assert weight.grad is not None
                weight.sub_(0.1 * weight.grad)
        return None


def model() -> nn.Module:
    return nn.Linear(4, 3)


def data() -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N * 5, 4, generator=generator), torch.randint(0, 3, (N * 5,), generator=generator)
    return ArrayData(x, y, {str(i): (5 * i, 5 * i + 5, 5 * i + 5) for i in range(N)}, classes=3)


def simulate(out: Path, acts: Mapping[str, str], workers: int = 0, **changes: Any) -> Run:
    fields: dict[str, Any] = {"rounds": 2, "cohort": N, "quorum": 0.5, "client": Troubled(acts)} | changes
    return Experiment(model=model, data=data(), **fields).simulate(workers=workers, out=out, progress="none")


def bits(run: Run) -> bytes:
    return run.parameters.trainable.numpy().tobytes()


def test_a_client_that_raises_is_shown_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate(tmp_path, {"7": "raise"})
    shown = capsys.readouterr().err

    assert "client '7' raised ValueError in round 1: my data is cursed" in shown
    assert "in fit" in shown and "Traceback" in shown
    assert run.failures[["round", "client"]].values.tolist() == [[1, "7"], [2, "7"]]
    assert run.metrics.loc[1, "counted"] == N - 1
    assert run.status == "finished"


@pytest.mark.parametrize(
    ("act", "why"), [("nan", "holds nan in its delta in tensor 'weight'"), ("nan metric", "mine=nan")]
)
def test_an_update_that_is_not_finite_is_not_counted(tmp_path: Path, act: str, why: str) -> None:
    run = simulate(tmp_path, {"3": act})

    assert why in run.failures.reason[0]
    assert torch.isfinite(run.parameters.trainable).all()
    with pytest.raises(RoundError, match=r"round 1 has 39 of 40 updates and needs 40; first failure: .*client '3'"):
        simulate(tmp_path, {"3": act}, quorum=1.0)


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_client(tmp_path: Path) -> None:
    """Culprits fail, their leaves are repeated without them, and the bits are those of clients that merely raised."""
    run = simulate(tmp_path, {"5": "exit", "20": "die"}, workers=2, rounds=1)
    raised = simulate(tmp_path, {"5": "raise", "20": "raise"}, rounds=1)

    assert sorted(run.failures.client) == ["20", "5"]
    assert all("brought its worker process down" in reason for reason in run.failures.reason)
    assert bits(run) == bits(raised)


@pytest.mark.slow
def test_a_client_that_never_answers_costs_one_deadline(tmp_path: Path) -> None:
    run = simulate(tmp_path, {"20": "hang"}, workers=2, rounds=1, deadline=6.0)

    assert run.failures.client.tolist() == ["20"]
    assert run.failures.reason[0] == "client '20' did not answer before the deadline"
    assert run.metrics.loc[1, "counted"] == N - 1


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_client_that_asks_at_a_terminal_fails_alone(tmp_path: Path) -> None:
    run = simulate(tmp_path, {"20": "ask"}, workers=2, rounds=1)

    assert run.failures.client.tolist() == ["20"]
    assert "raised EOFError" in run.failures.reason[0]


def test_a_client_whose_data_raises_fails_alone(tmp_path: Path) -> None:
    def shard(client: str) -> Shard:
        if client == "3":
            raise OSError("disk on fire")
        return Shard(torch.ones(3, 4), torch.tensor([0, 1, 2]))

    lazy = LazyData(Numbered(8), shard, classes=3)
    made = Experiment(model=model, data=lazy, rounds=1, cohort=8, quorum=0.5)
    run = made.simulate(workers=0, out=tmp_path, progress="none")

    assert run.failures.values.tolist() == [[1, "3", "client '3' raised OSError in round 1: disk on fire"]]
    assert run.metrics.loc[1, "counted"] == 7


@pytest.mark.slow
@pytest.mark.timeout(35)
def test_clients_that_hang_cost_one_deadline_together(tmp_path: Path) -> None:
    """Every worker hangs: whoever had to wait for them has failed too, at the same deadline."""
    everyone = {str(i): "hang" for i in range(N)}
    with pytest.raises(RoundError, match="round 1 has 0 of 40 updates"):
        simulate(tmp_path, everyone, workers=2, deadline=2.0, rounds=1)  # twenty deadlines would not end in time


class Where(Client):
    """Says in which process it trained."""

    def fit(self, work: Work) -> Mapping[str, float]:
        return {"process": float(os.getpid())}


@pytest.mark.slow
def test_a_small_cohort_keeps_every_worker_busy(tmp_path: Path) -> None:
    made = Experiment(model=model, data=data(), rounds=3, cohort=10, client=Where())
    run = made.simulate(workers=2, out=tmp_path, progress="none")

    assert run.clients["process"].nunique() == 2


@pytest.mark.slow
def test_workers_end_with_their_run(tmp_path: Path) -> None:
    """A run that is killed leaves no worker behind, not even one whose client hangs."""
    code = f"""
        import os, signal, shoal, torch

        class Hangs(shoal.Client):
            def fit(self, work):
                os.write(1, b"%d\\n" % os.getpid())
                signal.pause()

        data = shoal.datasets.from_arrays(torch.randn(6, 4), [0, 1, 2] * 2, clients=list("ababab"))
        made = shoal.Experiment(model="linear", data=data, client=Hangs(), rounds=1, cohort=2)
        made.simulate(workers=2, out={str(tmp_path)!r}, progress="none")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    assert all(int(process.stdout.readline()) for _ in range(2))
    process.kill()
    process.wait()
    # The pipe's other end is held by the workers: it is closed when the last of them is gone.
    assert process.stdout.read() == b""
    process.stdout.close()


@pytest.mark.slow
def test_what_a_client_prints_does_not_disturb_the_pipe(tmp_path: Path) -> None:
    assert len(simulate(tmp_path, {"5": "print"}, workers=1, rounds=1).failures) == 0


def test_spare_clients_stand_in_for_failed_ones(tmp_path: Path) -> None:
    """Over-selection counts the first that succeed, in cohort order: failures are filled up, nobody else is counted."""
    plain = simulate(tmp_path, {}, rounds=1, cohort=20, over_select=1.5, quorum=1.0)
    failing = plain.clients.client[0], plain.clients.client[7]
    run = simulate(tmp_path, dict.fromkeys(failing, "raise"), rounds=1, cohort=20, over_select=1.5, quorum=1.0)

    assert plain.metrics.loc[1, ["asked", "counted"]].tolist() == [30, 20]
    assert run.metrics.loc[1, ["asked", "counted", "failed"]].tolist() == [30, 20, 2]
    assert run.clients.client.tolist()[:18] == [c for c in plain.clients.client if c not in failing]


def test_client_state_moves_only_when_counted(tmp_path: Path) -> None:
    """A SCAFFOLD client whose update is rejected keeps the control variate it had."""
    run = simulate(tmp_path, {"3": "nan"}, strategy=Scaffold(), local=LocalTraining(lr=0.1), rounds=2)
    with closing(ClientStates(run.path / "states.sqlite")) as states:
        states.restore(2)

        assert set(states.clients()) == {str(client) for client in range(N)} - {"3"}


@pytest.mark.slow
def test_functions_of_a_notebook_work_in_workers(tmp_path: Path) -> None:
    """Code read from standard input, as a notebook's cells: nothing can be imported again; an event loop is running."""
    code = f"""
        import asyncio, torch, shoal
        from torch import nn

        class Mine(shoal.Client):
            def fit(self, work):
                optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1)
                for x, y in work.batches():
                    work.step(nn.functional.cross_entropy(work.model(x), y), optimizer)

        make = lambda: nn.Linear(4, 3)
        x, y = torch.randn(60, 4), torch.arange(60) % 3
        data = shoal.datasets.from_arrays(x, y, clients=[str(i % 6) for i in range(60)])
        made = shoal.Experiment(model=make, data=data, client=Mine(), rounds=2, cohort=4)

        async def main():
            return made.simulate(workers=2, out={str(tmp_path)!r}, progress="none")

        print(asyncio.run(main()).status)
    """
    done = subprocess.run([sys.executable, "-"], input=textwrap.dedent(code), capture_output=True, text=True)

    assert (done.stdout.strip(), done.returncode) == ("finished", 0), done.stderr


@pytest.mark.slow
def test_a_model_that_workers_cannot_build_is_said_at_once(tmp_path: Path) -> None:
    process = os.getpid()

    def here_only() -> nn.Module:
        if os.getpid() != process:
            raise OSError("no such weights")
        return model()

    with pytest.raises(ExperimentError, match="OSError: no such weights"):
        Experiment(model=here_only, data=data(), cohort=4).simulate(workers=1, out=tmp_path, progress="none")


def test_a_million_clients_cost_their_cohort(tmp_path: Path) -> None:
    made = list[str]()

    def shard(client: str) -> Shard:
        made.append(client)
        return Shard(torch.full((3, 4), float(client) / 1e6), torch.tensor([0, 1, 2]))

    lazy = LazyData(Numbered(1_000_000), shard, classes=3)
    run = Experiment(model=model, data=lazy, rounds=2, cohort=5).simulate(workers=0, out=tmp_path, progress="none")

    assert run.status == "finished"
    assert len(made) < 20


def test_a_million_clients_are_evaluated_as_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """No list of all is made: neither of jobs, nor of shards, nor of answers."""
    monkeypatch.setattr(fleets, "AT_ONCE", 100)
    made = list[str]()

    def shard(client: str) -> Shard:
        made.append(client)
        x, y = torch.ones(2, 4), torch.tensor([0, 1])
        return Shard(x, y, x, y)

    lazy = LazyData(Numbered(1_000_000), shard, classes=3)
    composition = Composition(Experiment(model=model, data=lazy, cohort=5))
    with closing(SimulatedFleet(composition.assignment)) as fleet:
        coordinator = composition.coordinator(fleet, composition.start(), [])
        ask = coordinator.ask(1)
        answers = fleet.evaluate(replace(ask, cohort=fleet.population, goal=len(fleet.population)))
        first = [next(answers) for _ in range(101)]

    assert [answer.client for answer in first] == [str(client) for client in range(101)]
    assert len(made) <= 210


@pytest.mark.slow
@pytest.mark.skipif(memory_mb() is None, reason="the system does not tell")
@pytest.mark.parametrize("strategy", ["FedAvg()", "Scaffold()"])
def test_a_million_clients_take_the_memory_of_their_cohort(tmp_path: Path, strategy: str) -> None:
    """A run of a thousand, then one of a million in the same process, whose peak is to be no higher."""
    code = f"""
        import torch, shoal
        from shoal import datasets
        from shoal.client.data import Shard
        from shoal.memory import memory_mb

        def shard(client):
            x, y = torch.full((4, 50), float(client) / 1e6), torch.tensor([0, 1, 2, 0])
            return Shard(x[:3], y[:3], x[3:], y[3:])

        for clients in (1_000, 1_000_000):
            data = datasets.LazyData(datasets.Numbered(clients), shard, classes=3)
            made = shoal.Experiment(model="linear", data=data, rounds=20, cohort=50, strategy=shoal.{strategy})
            made.simulate(workers=0, out={str(tmp_path)!r}, progress="none")
            print(memory_mb())
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    few, many = map(float, said.stdout.split())

    assert many < few + 20
