"""Which engine is chosen, why one is refused, and that measuring leaves no trace."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shoal import Client, Experiment, LocalTraining, Run, Scaffold, Work
from shoal.client.data import Shard
from shoal.client.net import parameters_of
from shoal.protos.errors import ExperimentError
from shoal.server.fleet import Ask
from shoal.simulations import planner
from shoal.simulations.block import BlockTrainer
from shoal.simulations.blocks import EngineName, Method
from shoal.simulations.engine import Assignment
from shoal.simulations.federated import ArrayData, LazyData, Numbered
from shoal.simulations.fleet import LEAN, portions
from shoal.simulations.planner import refusal
from shoal.strategies.base import Context, Update
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.sums import Carried


class Model(nn.Module):
    """Does something with the features ``[b, 6]`` before a dense layer."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 3), function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.function(self, x))
        return out


def data(clients: int = 20) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12 * clients, 6, generator=generator)
    y = torch.randint(0, 3, (12 * clients,), generator=generator)
    return ArrayData(x, y, {str(k): (12 * k, 12 * k + 9 + k % 3, 12 * k + 12) for k in range(clients)}, classes=3)


def why(model: Callable[[], nn.Module], engine: EngineName = "captured", **changes: Any) -> str | None:
    fields: dict[str, Any] = {"strategy": FedAvg(), "local": LocalTraining(batch_size=4)} | changes
    assignment = Assignment(model, fields.pop("data", data()), **fields)
    values = parameters_of(model())
    state, carried = {"parameters": values.trainable}, Carried(values.buffers, values.counters)
    return refusal(assignment, Ask(["0", "1", "2"], 3, state, carried, Context(1, 3, 3)), engine)


def linear() -> nn.Module:
    return nn.Linear(6, 3)


@pytest.mark.parametrize("engine", ["captured", "fused"])
def test_what_is_fit_is_not_refused(engine: EngineName) -> None:
    assert why(linear, engine) is None


# --- models ----------------------------------------------------------------------------------------------------------


def count(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return x if m.calls < 1000 else 2 * x


def remember(m: Any, x: Tensor) -> Tensor:
    before, m.kept = m.kept, x.mean(0)
    return torch.sub(x, before)


def write(m: Any, x: Tensor) -> Tensor:
    m.kept[:2] += 1
    return torch.add(x, m.kept)


def swap(m: Any, x: Tensor) -> Tensor:
    m.layer.bias.data = m.layer.bias.data + 1
    return x


def reseed(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return functional.dropout(x)


def recomputed(m: Any, x: Tensor) -> Tensor:
    def dropped(x: Tensor) -> Tensor:
        return functional.dropout(x * m.layer.bias.sum())

    return torch.as_tensor(checkpoint(dropped, x, use_reentrant=False))


def part_drawn(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones_like(x)
    mask[0].bernoulli_(0.5)
    return x * mask


def own_generator(m: Any, x: Tensor) -> Tensor:
    return x * torch.empty_like(x).bernoulli_(0.5, generator=torch.Generator().manual_seed(1))


def last_words(m: Any, x: Tensor) -> Tensor:
    lengths = (x > -2).sum(1).clamp(min=1).tolist()
    return torch.stack([row[:length].mean() * row for row, length in zip(x, lengths, strict=True)])


VALUES = "the model looks at values while it runs"
DRAWS = "only dropout can be repeated client by client"
MODELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "branches": (lambda m, x: x if x.sum() > 0 else -x, VALUES),
    "item": (lambda m, x: x * x.mean().item(), VALUES),
    "tolist": (last_words, VALUES),
    "numpy": (lambda m, x: x * float(np.asarray(x).mean()), VALUES),
    "a mask chooses": (lambda m, x: x + x[x > 0].mean(), VALUES),
    "splits": (lambda m, x: x * x.tensor_split(x[:, 0].argsort()[:1] + 1)[0].mean(), "not do the same in each step"),
    "noise": (lambda m, x: x + torch.randn_like(x), DRAWS),
    "its own generator": (own_generator, DRAWS),
    "part of a mask": (part_drawn, DRAWS),
    "sets the seed": (reseed, "sets the state of the random generator"),
    "recomputed dropout": (recomputed, "sets the state of the random generator"),
    "draws in Python": (lambda m, x: x if random.random() < 0.999 else -x, "counts or draws in Python"),
    "draws in numpy": (lambda m, x: x if np.random.rand() < 0.999 else -x, "counts or draws in Python"),
    "counts": (count, "counts or draws in Python"),
    "remembers": (remember, "not do the same in each step"),
    "writes": (write, "changes a tensor that is not part of its state"),
    "other memory": (swap, "gives a tensor of its state other memory"),
    "wrong in vmap": (
        lambda m, x: x + (m.layer.weight @ m.layer.weight.t()).trace(),
        "is done wrong for several clients at once",
    ),
    "not in vmap": (lambda m, x: torch._foreach_mul([x], 2.0)[0], "cannot be done for several clients at once"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_replayed_is_refused(name: str) -> None:
    function, words = MODELS[name]
    reason = why(lambda: Model(function, calls=0, kept=torch.zeros(6)))

    assert reason is not None and words in reason


# --- training --------------------------------------------------------------------------------------------------------


class Mine(Client):
    def fit(self, work: Work) -> Mapping[str, float] | None:
        return None


@pytest.mark.parametrize("local", [{"momentum": 0.9}, {"clip": 1.0}, {"optimizer": "adam"}, {"weight_decay": 0.1}])
def test_fused_is_plain_sgd(local: dict[str, Any]) -> None:
    training = LocalTraining(batch_size=4, **local)

    assert why(linear, "captured", local=training) is None
    assert why(linear, "fused", local=training) == (
        None if "weight_decay" in local else "the optimizer is not plain SGD"
    )


def test_a_fit_of_ones_own_is_refused() -> None:
    assert why(linear, client=Mine()) == "clients train in a fit of their own"


def test_a_model_of_one_parameter_is_refused() -> None:
    """A block's sum could not tell a column of its vectors from one of numbers."""
    one = ArrayData(torch.ones(12, 1), torch.ones(12, 1), {str(k): (4 * k, 4 * k + 4, 4 * k + 4) for k in range(3)})
    local = LocalTraining(batch_size=4, loss="mse")

    assert "one parameter" in (why(lambda: nn.Linear(1, 1, bias=False), data=one, local=local) or "")


def test_what_the_lean_engine_cannot_do_is_said() -> None:
    assert why(lambda: nn.Linear(5, 3)) == "none of the first clients can be trained"


def test_a_client_that_cannot_be_trained_is_not_held_against_an_engine() -> None:
    base = data(3)

    def shard(client: str) -> Shard:
        if client == "0":
            raise OSError("disk on fire")
        return base.shard(client)

    assert why(linear, data=LazyData(Numbered(3), shard)) is None


@pytest.mark.parametrize(("what", "words"), [("delta", "its weights"), ("buffers", "its buffers")])
def test_a_wrong_first_step_is_refused(what: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BlockTrainer.run

    def wrong(self: BlockTrainer, start: Tensor, **how: Any) -> Update:
        update = right(self, start, **how)
        getattr(update, what)[1] *= 1.001
        return update

    monkeypatch.setattr(BlockTrainer, "run", wrong)
    assert (
        why(lambda: nn.Sequential(nn.BatchNorm1d(6), linear()))
        == f"{words} after one step differs from the lean engine's"
    )


# --- choosing --------------------------------------------------------------------------------------------------------


def experiment(model: Callable[[], nn.Module] = linear, **changes: Any) -> Experiment:
    fields: dict[str, Any] = {"rounds": 3, "cohort": 12, "local": LocalTraining(lr=0.1, batch_size=4)} | changes
    return Experiment(model=model, data=data(), **fields)


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Run]:
    def go(made: Experiment, engine: str) -> Run:
        return made.simulate(engine=engine, workers=0, out=tmp_path, progress="none")

    return go


def recorded(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "env.json").read_text())
    return found


@pytest.fixture
def thorough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures also for runs that are too short for it."""
    monkeypatch.setattr(planner, "SHORT", 0.0)
    monkeypatch.setattr(planner, "SHARE", 1e9)


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("engine", ["auto", "captured", "fused"])
def test_measuring_leaves_no_trace(engine: str, simulate: Callable[..., Run]) -> None:
    made = experiment(strategy=Scaffold())
    planned = simulate(made, engine)
    chosen = recorded(planned)["engine"]
    given = simulate(made, chosen)

    assert torch.equal(planned.parameters.trainable, given.parameters.trainable)
    assert planned.metrics["train_loss"].equals(given.metrics["train_loss"])
    assert recorded(planned)["plan"]["measured"][chosen] > 0


@pytest.mark.usefixtures("thorough")
def test_a_model_that_is_refused_is_trained_by_the_lean_engine(simulate: Callable[..., Run]) -> None:
    made = experiment(lambda: Model(lambda m, x: x if x.sum() > 0 else -x))
    run = simulate(made, "auto")

    assert run.status == "finished" and recorded(run)["engine"] == "lean"
    assert {VALUES in reason for reason in recorded(run)["plan"]["refused"].values()} == {True}
    assert torch.equal(run.parameters.trainable, simulate(made, "lean").parameters.trainable)
    with pytest.raises(
        ExperimentError, match=f"engine 'captured' cannot run this experiment: {VALUES}.*use engine 'auto'"
    ):
        simulate(made, "captured")


@given(st.integers(1, 300), st.integers(0, 130), st.integers(1, 9), st.booleans())
def test_portions_are_the_cohort(count: int, block: int, workers: int, alone: bool) -> None:
    found = portions(count, Method("fused", block) if block else LEAN, workers, alone=alone)

    assert [position for portion in found for position in portion] == list(range(count))
    assert all(found)
