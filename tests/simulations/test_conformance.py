"""One suite over all strategies on the real engine: nothing but the experiment leaves a trace in the bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal import Evaluation, Experiment, LocalTraining, Run, Strategy, resume
from shoal.client.data import Shard
from shoal.protos import registry
from shoal.simulations.federated import ArrayData

STRATEGIES = registry.names("shoal.strategies")
OPTIONS: dict[str, dict[str, Any]] = {"perfedavg": {"variant": "first-order"}}  # BatchNorm takes no third of a batch
BLOCKS = ("captured:6", "fused:16")
# One for each way to work: server state, client state, training twice, a mask, buffers, gradients, losses, a reply.
SOME = ("fedadam", "scaffold", "ditto", "fedrep", "fedbn", "pfedme", "moon", "mimelite")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def data(clients: int = 40) -> ArrayData:
    """Unequal shards, each with labels of its own kind."""
    generator = torch.Generator().manual_seed(3)
    offsets, rows = {}, 0
    for client in range(clients):
        n = 5 + client % 7
        offsets[f"c{client}"] = (rows, rows + n, rows + n + 2)
        rows += n + 2
    x = torch.randn(rows, 6, generator=generator)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return ArrayData(x, y, offsets, Shard(x[:50], y[:50]), classes=3)


def experiment(strategy: str | Strategy, **changes: Any) -> Experiment:
    made = strategy if isinstance(strategy, Strategy) else _made(strategy)
    fields: dict[str, Any] = {
        "rounds": 4,
        "cohort": 20,
        "local": LocalTraining(lr=0.05, batch_size=4, drop_last=True),
    } | changes
    return Experiment(model=net, data=data(), strategy=made, **fields)


def _made(name: str) -> Strategy:
    strategy: Strategy = registry.load("shoal.strategies", name)(**OPTIONS.get(name, {}))
    return strategy


def bits(run: Run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in run.parameters.named().items()}


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Run]:
    def go(made: Experiment, workers: int = 0, engine: str = "lean") -> Run:
        return made.simulate(engine=engine, workers=workers, out=tmp_path, progress="none")

    return go


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "engine"),
    [*((name, "lean") for name in ("scaffold", "fedbn", "moon")), *(("scaffold", block) for block in BLOCKS)],
)
def test_workers_leave_no_trace(strategy: str, engine: str, simulate: Callable[..., Run]) -> None:
    alone = simulate(experiment(strategy), engine=engine)
    together = simulate(experiment(strategy), workers=2, engine=engine)

    assert bits(alone) == bits(together)
    numbers = [column for column in alone.metrics.columns if "seconds" not in column]
    assert alone.metrics[numbers].equals(together.metrics[numbers])


@pytest.mark.parametrize("engine", BLOCKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_engine_gives_the_numbers_of_the_lean_one(
    strategy: str, engine: str, simulate: Callable[..., Run]
) -> None:
    """BatchNorm, dropout, unequal shards, client states: after five rounds equal to 1e-10 in float64."""
    made = experiment(strategy, rounds=5, dtype="float64", evaluation=Evaluation(clients_every=5))
    lean, block = simulate(made), simulate(made, engine=engine)

    for name, tensor in lean.parameters.named().items():
        torch.testing.assert_close(block.parameters.named()[name], tensor, rtol=1e-10, atol=1e-10)
    numbers = [column for column in lean.metrics.columns if "seconds" not in column]
    assert block.metrics[numbers].to_numpy(float) == pytest.approx(lean.metrics[numbers].to_numpy(float), nan_ok=True)


@pytest.mark.parametrize(("strategy", "engine"), [(name, engine) for name in SOME for engine in ("lean", *BLOCKS)])
def test_a_resume_leaves_no_trace(strategy: str, engine: str, simulate: Callable[..., Run]) -> None:
    whole = simulate(experiment(strategy), engine=engine)
    part = simulate(experiment(strategy, rounds=2), engine=engine)
    done = resume(part.path, rounds=4, experiment=experiment(strategy), progress="none")

    assert bits(done) == bits(whole)
    assert done.metrics.index.tolist() == [0, 1, 2, 3, 4]
    assert done.metrics["train_loss"].equals(whole.metrics["train_loss"])


@pytest.mark.parametrize("strategy", SOME)
def test_two_runs_are_one_run(strategy: str, simulate: Callable[..., Run]) -> None:
    torch.manual_seed(1)
    first = simulate(experiment(strategy, rounds=2))
    torch.manual_seed(2)
    torch.rand(7)

    assert bits(simulate(experiment(strategy, rounds=2))) == bits(first)
    assert bits(simulate(experiment(strategy, rounds=2, seed=1))) != bits(first)


@pytest.mark.parametrize("strategy", SOME)
def test_the_callers_generator_is_left_alone(strategy: str, simulate: Callable[..., Run]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    simulate(experiment(strategy, rounds=1))

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("strategy", SOME)
def test_batch_statistics_stay_valid(strategy: str, simulate: Callable[..., Run]) -> None:
    """A server optimizer over a variance can make it negative; here buffers are only ever averaged."""
    named = simulate(experiment(strategy, rounds=6)).parameters.named()

    assert (named["1.running_var"] > 0).all()
    assert int(named["1.num_batches_tracked"]) > 0
    assert named["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_buffers_are_the_example_weighted_mean(strategy: str, simulate: Callable[..., Run]) -> None:
    """One round, checked client by client against runs with that client alone."""
    whole = data(3)
    every = experiment(strategy, rounds=1, cohort=3)
    both = simulate(_with(every, whole)).parameters
    sums, examples = torch.zeros_like(both.buffers), 0
    for client, (start, middle, stop) in whole.offsets.items():
        alone = ArrayData(whole.x, whole.y, {client: (start, middle, stop)}, classes=3)
        run = simulate(_with(experiment(strategy, rounds=1, cohort=1), alone))
        sums, examples = sums + run.parameters.buffers * (middle - start), examples + middle - start

    torch.testing.assert_close(both.buffers, sums / examples, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_clients_are_one_client(strategy: str, simulate: Callable[..., Run]) -> None:
    """Full batches of the same examples: a cohort of four takes the step of one."""
    base = data()
    x, y = base.x[:8].double(), base.y[:8]
    local = LocalTraining(lr=0.1, batch_size=0, epochs=3)

    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def run(clients: int) -> Tensor:
        offsets = {f"c{i}": (8 * i, 8 * i + 8, 8 * i + 8) for i in range(clients)}
        same = ArrayData(x.repeat(clients, 1), y.repeat(clients), offsets, classes=3)
        made = experiment(strategy, local=local, cohort=clients, dtype="float64")
        return simulate(_with(made, same, small)).parameters.trainable

    torch.testing.assert_close(run(4), run(1), rtol=1e-12, atol=1e-12)


def _with(made: Experiment, changed: ArrayData, model: Callable[[], nn.Module] = net) -> Experiment:
    from dataclasses import replace

    return replace(made, data=changed, model=model)
