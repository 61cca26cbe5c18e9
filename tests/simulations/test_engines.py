"""The engines for blocks beside the lean one: data and clients of all kinds, workers, and what is lost with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal import Experiment, LocalTraining, Run, Scaffold, resume
from shoal.client.data import Shard
from shoal.protos import registry
from shoal.simulations.federated import FederatedData, LazyData, Numbered

BLOCKS = ("captured:4", "fused:16")
N = 20
Make = Callable[[], nn.Module]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Text(nn.Module):
    """The mean of the embeddings of any number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x).mean(1))
        return out


def numbers(client: str, n: int) -> Shard:
    generator = torch.Generator().manual_seed(int(client))
    return Shard(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def tokens(client: str, n: int, length: int = 7) -> Shard:
    generator = torch.Generator().manual_seed(int(client))
    return Shard(torch.randint(0, 9, (n, length), generator=generator), torch.randint(0, 3, (n,), generator=generator))


def unequal(client: str) -> int:
    return 1 + int(client) * 7 % 13


def lazy(shard: Callable[[str], Shard]) -> LazyData:
    return LazyData(Numbered(N), shard, classes=3)


def experiment(data: FederatedData, model: Make = net, **changes: Any) -> Experiment:
    fields: dict[str, Any] = {
        "rounds": 2,
        "cohort": N,
        "quorum": 0.5,
        "dtype": "float64",
        "local": LocalTraining(lr=0.1, batch_size=4, epochs=2),
    } | changes
    return Experiment(model=model, data=data, **fields)


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Run]:
    def go(made: Experiment, engine: str = "lean", workers: int = 0) -> Run:
        return made.simulate(engine=engine, workers=workers, out=tmp_path, progress="none")

    return go


def check_equal(block: Run, lean: Run) -> None:
    """Up to rounding; the same clients failed, for the same reasons."""
    torch.testing.assert_close(block.parameters.trainable, lean.parameters.trainable, rtol=1e-10, atol=1e-10)
    columns = [column for column in lean.metrics.columns if "seconds" not in column]
    assert block.metrics[columns].to_numpy(float) == pytest.approx(lean.metrics[columns].to_numpy(float), nan_ok=True)
    assert block.failures[["round", "client", "reason"]].equals(lean.failures[["round", "client", "reason"]])


def bits(run: Run) -> bytes:
    return run.parameters.trainable.numpy().tobytes()


# --- data ------------------------------------------------------------------------------------------------------------


def transposed(client: str) -> Shard:
    shard = numbers(client, unequal(client))
    return Shard(shard.x.t().contiguous().t(), shard.y)


DATA: dict[str, tuple[Callable[[str], Shard], Make]] = {
    "unequal shards": (lambda client: numbers(client, unequal(client)), net),
    "one example each": (lambda client: numbers(client, 1), net),
    "transposed": (transposed, net),
    "token ids": (lambda client: tokens(client, unequal(client)), Text),
    "texts of any length": (lambda client: tokens(client, unequal(client), 5 + int(client) // 5), Text),
}


@pytest.mark.parametrize("engine", BLOCKS)
@pytest.mark.parametrize("name", DATA)
def test_any_data_gives_the_lean_engines_numbers(name: str, engine: str, simulate: Callable[..., Run]) -> None:
    shard, model = DATA[name]
    made = experiment(lazy(shard), model)

    check_equal(simulate(made, engine), simulate(made))


def troubled(trouble: str, client: str) -> Shard:
    """Clients 7 and 12 have it."""
    shard = tokens(client, 9) if trouble == "a token" else numbers(client, 9)
    if client not in ("7", "12"):
        return shard
    if trouble == "raises":
        raise OSError("disk on fire")
    if trouble == "a token":
        shard.x[4, 2] = 9
    if trouble == "a label":
        shard.y[4] = 3
    if trouble == "nan":
        shard.x[4, 2] = torch.nan
    return Shard(shard.x[:0], shard.y[:0]) if trouble == "nothing" else shard


TROUBLES = {
    "raises": "raised OSError in round 1: disk on fire",
    "a token": "raised IndexError in round 1: index out of range in self",
    "a label": "raised IndexError in round 1: Target 3 is out of bounds",
    "nan": "training diverged",
    "nothing": "has no examples to train on",
}


@pytest.mark.parametrize("engine", BLOCKS)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_only_those_fail_whose_fault_it_is(trouble: str, engine: str, simulate: Callable[..., Run]) -> None:
    made = experiment(lazy(lambda client: troubled(trouble, client)), Text if trouble == "a token" else net)
    block = simulate(made, engine)

    assert sorted(block.failures.client[:2]) == ["12", "7"]
    assert all(TROUBLES[trouble] in reason for reason in block.failures.reason[:2])
    check_equal(block, simulate(made))


@pytest.mark.parametrize("engine", BLOCKS)
def test_a_batch_that_the_model_refuses_costs_the_clients_that_have_one(
    engine: str, simulate: Callable[..., Run]
) -> None:
    """Batch normalisation cannot train on the one example that is left of nine."""
    made = experiment(
        lazy(lambda client: numbers(client, 9 if int(client) % 5 == 2 else 8)),
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    )
    block = simulate(made, engine)

    assert sorted(block.failures.client[:4]) == ["12", "17", "2", "7"]
    check_equal(block, simulate(made))


# --- strategies and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", BLOCKS)
@pytest.mark.parametrize("strategy", ["fedavg", "fednova", "scaffold", "ditto", "fedrep", "perfedavg", "moon"])
def test_strategies_of_every_kind_after_five_rounds(strategy: str, engine: str, simulate: Callable[..., Run]) -> None:
    """With momentum where engine and strategy have it."""
    momentum = 0.9 if engine.startswith("captured") and strategy != "scaffold" else 0.0
    made = registry.load("shoal.strategies", strategy)(**({"momentum": momentum} if strategy == "fednova" else {}))
    local = LocalTraining(lr=0.05, batch_size=4, epochs=2, momentum=momentum, lr_decay=0.9)
    whole = experiment(lazy(lambda client: numbers(client, unequal(client))), strategy=made, rounds=5, local=local)

    check_equal(simulate(whole, engine), simulate(whole))


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_and_a_resume_leave_no_trace(simulate: Callable[..., Run]) -> None:
    """Skewed shards, and clients that keep control variates."""

    def made(rounds: int) -> Experiment:
        data = lazy(lambda client: numbers(client, 1 + int(client) ** 2 % 37))
        return experiment(data, strategy=Scaffold(), rounds=rounds, dtype="float32")

    runs = [simulate(made(3), "fused:16", workers) for workers in (0, 2)]
    part = simulate(made(1), "fused:16", 1)
    runs.append(resume(part.path, rounds=3, experiment=made(3), progress="none"))

    assert len({bits(run) for run in runs}) == 1
    assert runs[0].metrics["train_loss"].equals(runs[-1].metrics["train_loss"])


def dying(client: str, folder: Path, times: int) -> Shard:
    """Client 7 brings its worker down, some times."""
    if client == "7":
        before = len(list(folder.glob("died*")))
        if before < times:
            (folder / f"died{before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return numbers(client, unequal(client))


@pytest.mark.slow
def test_a_worker_that_dies_once_leaves_no_trace(tmp_path: Path, simulate: Callable[..., Run]) -> None:
    """As one does that the system kills: whose fault it was is not known, so everybody is asked again."""
    folder, never = tmp_path, lazy(lambda client: dying(client, folder, 0))
    once = lazy(lambda client: dying(client, folder, 1))
    whole = simulate(experiment(never, rounds=1), "captured:4")
    found = simulate(experiment(once, rounds=1), "captured:4", 2)

    assert (folder / "died0").exists() and len(found.failures) == 0
    assert bits(found) == bits(whole)


@pytest.mark.slow
def test_a_client_that_brings_workers_down_fails_alone(tmp_path: Path, simulate: Callable[..., Run]) -> None:
    """The others' block is as it would be if the client had raised."""
    folder = tmp_path

    def raising(client: str) -> Shard:
        if client == "7":
            raise OSError("disk on fire")
        return numbers(client, unequal(client))

    always = lazy(lambda client: dying(client, folder, 1000))
    found = simulate(experiment(always, rounds=1), "fused:16", 2)
    raised = simulate(experiment(lazy(raising), rounds=1), "fused:16")

    assert found.failures.client.tolist() == ["7"]
    assert "brought its worker process down" in found.failures.reason[0]
    assert bits(found) == bits(raised)
