"""The lean trainer against PyTorch's own optimizers and a hand-written loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.client.client import Client, FitTrainer, Work
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net, parameters_of
from shoal.client.participant import evaluate
from shoal.client.trainer import LeanTrainer, Turn, batches, turn_of
from shoal.protos.errors import ExperimentError, InvalidUpdate
from shoal.strategies.base import Drift, Strategy
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fednova import FedNova
from shoal.strategies.scaffold import Scaffold
from shoal.strategies.sums import Carried


def shard(rows: int = 23) -> Shard:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    return Shard(x, torch.randint(0, 3, (rows,), generator=generator))


def module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def turn(lr: float = 0.1) -> Turn:
    return Turn("a", 1, shard(), rng(), lr)


def carried(net: Net) -> Carried:
    values = parameters_of(net.module)
    return Carried(values.buffers, values.counters)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def lean(local: LocalTraining, drift: Drift | None = None, **run: Any) -> Tensor:
    net = Net(module())
    start = net.flat.clone()
    return start + LeanTrainer(net, local, turn(local.lr), carried(net)).run(start, drift=drift, **run).delta


def by_hand(local: LocalTraining, make: Any, drift: Drift | None = None) -> Tensor:
    """The same batches through torch.optim, with the drift put into ``.grad``."""
    model = module()
    optimizer = make(model.parameters())
    for x, y in batches(shard(), local.batch_size, local.epochs, rng()):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if drift is not None:
            flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            added = drift(flat) if callable(drift) else drift
            for p, part in zip(model.parameters(), added.split([p.numel() for p in model.parameters()]), strict=True):
                assert p.grad is not None
                p.grad += part.view_as(p)
        if local.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), local.clip)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


CASES = {
    "sgd": (LocalTraining(lr=0.1, batch_size=5, epochs=3), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        LocalTraining(lr=0.1, batch_size=5, epochs=3, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "nesterov": (
        LocalTraining(lr=0.1, batch_size=5, epochs=3, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "clip": (LocalTraining(lr=0.1, batch_size=5, clip=0.05), lambda p: torch.optim.SGD(p, lr=0.1)),
    "adam": (
        LocalTraining("adam", lr=0.01, batch_size=5, epochs=3, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    ),
    "adamw": (
        LocalTraining("adamw", lr=0.01, batch_size=5, epochs=3, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    ),
    "full batch": (LocalTraining(lr=0.1, batch_size=0, epochs=3), lambda p: torch.optim.SGD(p, lr=0.1)),
}


DRIFTS: dict[str, Drift | None] = {
    "none": None,
    "constant": torch.full((43,), 0.3, dtype=torch.float64),
    "pull": lambda w: 0.5 * w,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS)
def test_equals_torch_optim(name: str, drift: Drift | None) -> None:
    local, make = CASES[name]

    torch.testing.assert_close(lean(local, drift), by_hand(local, make, drift), rtol=1e-12, atol=1e-12)


def test_an_epoch_sees_each_example_once() -> None:
    drawn = [(x[:, None] == shard().x).all(-1).nonzero()[:, 1] for x, _ in batches(shard(), 5, 1, rng())]
    seen = torch.cat(drawn).tolist()

    assert sorted(seen) == list(range(23))
    assert seen != sorted(seen)


def test_every_epoch_has_its_own_order() -> None:
    parts = [x for x, _ in batches(shard(20), 5, 2, rng())]

    assert not torch.equal(torch.cat(parts[:4]), torch.cat(parts[4:]))


def test_reports_the_work_done() -> None:
    net, local = Net(module()), LocalTraining(lr=0.1, batch_size=5, epochs=2)
    update = LeanTrainer(net, local, turn(), carried(net)).run(net.flat.clone())

    assert (update.examples, update.steps, update.lr_sum) == (23, 10, pytest.approx(1.0))
    assert 0 < update.metrics["loss"] < 2
    assert update.buffers is None and update.counters is None


def test_steps_replace_epochs() -> None:
    net, local = Net(module()), LocalTraining(lr=0.1, batch_size=5, epochs=9, steps=7)

    assert LeanTrainer(net, local, turn(), carried(net)).run(net.flat.clone()).steps == 7
    assert LeanTrainer(net, local, turn(), carried(net)).run(net.flat.clone(), epochs=1).steps == 5


def test_loss_and_gradient_over_the_whole_shard() -> None:
    net, data = Net(module()), shard()
    trainer = LeanTrainer(net, LocalTraining(), turn(), carried(net))
    at = net.flat.clone()
    model = module()
    expected = functional.cross_entropy(model(data.x), data.y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(expected, list(model.parameters()))])

    torch.testing.assert_close(trainer.loss(at), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trainer.gradient(at), gradient, rtol=1e-12, atol=1e-12)


def test_the_gradient_leaves_batch_statistics_alone() -> None:
    net = Net(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    before = [b.clone() for b in net.module.buffers()]
    LeanTrainer(net, LocalTraining(), turn(), carried(net)).gradient(net.flat.clone())

    assert all(torch.equal(a, b) for a, b in zip(before, net.module.buffers(), strict=True))


def test_a_parameter_that_the_loss_does_not_reach_stays() -> None:
    model = module()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    net = Net(model)
    LeanTrainer(net, LocalTraining(), turn(), carried(net)).run(net.flat.clone())

    assert torch.equal(model.unused, torch.ones(2, dtype=torch.float64))  # type: ignore[arg-type]


class ByHand(Client):
    """The declared training, written out."""

    def fit(self, work: Work) -> dict[str, float]:
        optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1)
        for x, y in work.batches():
            work.step(functional.cross_entropy(work.model(x), y), optimizer)
        return {"mine": 1}


class Lazy(Client):
    """Trains nothing."""

    def fit(self, work: Work) -> None:
        return None


def fit(client: Client, drift: Drift | None, strategy: Strategy | None = None, **local: Any) -> Any:
    net, declared = Net(module()), LocalTraining(**({"lr": 0.1, "batch_size": 5, "epochs": 2} | local))
    start = net.flat.clone()
    return FitTrainer(client, strategy or FedAvg(), net, declared, turn(), carried(net)).run(start, drift=drift)


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS)
def test_a_custom_fit_obeys_the_strategy(drift: Drift | None) -> None:
    local = LocalTraining(lr=0.1, batch_size=5, epochs=2)
    update = fit(ByHand(), drift)

    torch.testing.assert_close(Net(module()).flat + update.delta, lean(local, drift), rtol=1e-12, atol=1e-12)
    assert (update.steps, update.lr_sum, update.metrics) == (10, pytest.approx(1.0), {"mine": 1.0})


def test_a_fit_that_skips_the_correction_is_refused() -> None:
    assert fit(Lazy(), None).steps == 0
    with pytest.raises(InvalidUpdate, match=r"client 'a'.*work.step"):
        fit(Lazy(), torch.zeros(43, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "local.betas"),
        ({"nesterov": True}, "needs local.momentum"),
    ],
)
def test_impossible_local_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        LocalTraining(**arguments)


class Rebinding(ByHand):
    """Puts new tensors and parameters in the place of the old ones, as ported code does."""

    def fit(self, work: Work) -> dict[str, float]:
        super().fit(work)
        first = work.model[0]  # type: ignore[index]
        first.weight.data = first.weight.data.clone()
        first.bias = nn.Parameter(first.bias.detach().clone())
        return {}


def test_weights_that_fit_binds_anew_are_taken_in() -> None:
    net, local = Net(module()), LocalTraining(lr=0.1, batch_size=5, epochs=2)
    start, expected = net.flat.clone(), fit(ByHand(), None).delta
    for _ in range(2):
        update = FitTrainer(Rebinding(), FedAvg(), net, local, turn(), carried(net)).run(start)
        assert torch.equal(update.delta, expected)


class Leaving(Client):
    """Never clears its gradients."""

    def fit(self, work: Work) -> None:
        for x, y in work.batches():
            functional.cross_entropy(work.model(x), y).backward()
            work.correct(0.1)
        for parameter in work.model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.1 * parameter.grad


def test_gradients_of_one_client_do_not_reach_the_next() -> None:
    net, local = Net(module()), LocalTraining(lr=0.1, batch_size=5)
    start = net.flat.clone()
    first, second = (
        FitTrainer(Leaving(), FedAvg(), net, local, turn(), carried(net)).run(start).delta for _ in range(2)
    )

    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["examples", "round", "client"])
def test_fit_may_not_name_its_metrics_as_shoal_names_its_own(name: str) -> None:
    class Clashing(ByHand):
        def fit(self, work: Work) -> dict[str, float]:
            return {name: -5, "mine": 1}

    with pytest.raises(InvalidUpdate, match=rf"\['{name}'\], names of Shoal's own"):
        fit(Clashing(), None)


def test_fit_sees_the_declared_steps_and_learning_rate() -> None:
    class Counting(Client):
        def fit(self, work: Work) -> dict[str, float]:
            return {"batches": len([*work.batches()]), "rate": work.lr}

    assert fit(Counting(), None, steps=7).metrics == {"batches": 7, "rate": 0.1}


def test_a_strategy_judges_the_optimizer_that_fit_uses() -> None:
    class WithAdam(Client):
        def fit(self, work: Work) -> None:
            optimizer = torch.optim.Adam(work.model.parameters())
            work.step(functional.cross_entropy(work.model(work.data.x), work.data.y), optimizer)

    assert fit(WithAdam(), None).steps == 1
    with pytest.raises(ExperimentError, match=r"Scaffold is not valid with fit's Adam: .*plain SGD"):
        fit(WithAdam(), None, Scaffold())


def test_a_strategy_hears_of_nesterovs_momentum_in_fit() -> None:
    class WithNesterov(Client):
        def fit(self, work: Work) -> None:
            optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            work.step(functional.cross_entropy(work.model(work.data.x), work.data.y), optimizer)

    with pytest.raises(ExperimentError, match=r"FedNova is not valid with fit's SGD: .*Nesterov"):
        fit(WithNesterov(), None, FedNova(momentum=0.9))


class InPlace(nn.Module):
    """Changes its input, as normalising code often does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.sub_(1.0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_model_that_changes_its_input_leaves_the_data_alone(size: int) -> None:
    net, given = Net(InPlace()), turn()
    before = given.shard.x.clone()
    trainer = LeanTrainer(net, LocalTraining(batch_size=size), given, carried(net))
    trainer.run(net.flat.clone())
    trainer.gradient(net.flat.clone())
    evaluate(net, LocalTraining(), given.shard)

    assert torch.equal(given.shard.x, before)


def test_buffers_outside_the_state_start_anew_for_each_task() -> None:
    model = module()
    model.register_buffer("seen", torch.zeros(1), persistent=False)
    net = Net(model)
    model.seen.add_(5)  # type: ignore[operator]
    net.restore(None, None)

    assert model.seen.tolist() == [0.0]  # type: ignore[operator]


@pytest.mark.parametrize("first", [None, torch.zeros(2)])
def test_buffers_outside_the_state_may_be_made_anew_in_a_task(first: Tensor | None) -> None:
    model = module()
    model.register_buffer("kept", torch.zeros(1), persistent=False)
    model.register_buffer("cache", first, persistent=False)
    net = Net(model)
    model.cache = torch.arange(4)
    net.restore(None, None)

    assert torch.equal(model.cache, first) if isinstance(first, Tensor) else model.cache is None


class HalfFrozen(nn.Sequential):
    """Its normalisation stays as it was, as in fine-tuning."""

    def train(self, mode: bool = True) -> HalfFrozen:
        super().train(mode)
        self[1].eval()
        return self


def test_what_a_model_keeps_in_evaluation_is_so_from_the_first_task_on() -> None:
    net = Net(HalfFrozen(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double())
    start, kept = net.flat.clone(), carried(net)
    fresh = LeanTrainer(net, LocalTraining(), turn(), kept).run(start)
    evaluate(net, LocalTraining(), shard())
    again = LeanTrainer(net, LocalTraining(), turn(), kept).run(start)

    assert torch.equal(fresh.delta, again.delta)
    assert fresh.buffers is not None and torch.equal(fresh.buffers, kept.buffers)


def test_a_metric_gives_one_number_an_example() -> None:
    local = LocalTraining(metrics=(lambda output, target: (output.argmax(1) == target).double().mean(),))
    with pytest.raises(ExperimentError, match=r"gave \[\] for 23 examples"):
        evaluate(Net(module()), local, shard())


@pytest.mark.parametrize(("loss", "metrics"), [("cross-entropy", ("accuracy",)), ("mse", ("mae",)), (len, ())])
def test_metrics_fit_the_loss(loss: Any, metrics: tuple[str, ...]) -> None:
    assert LocalTraining(loss=loss).metrics == metrics
    assert LocalTraining(loss=loss, metrics=()).metrics == ()


def test_stragglers_do_a_part_of_the_work() -> None:
    """Each client and round for itself, and the same in every process."""
    local = LocalTraining(batch_size=5, epochs=4, stragglers=0.5)
    works = {(c, r): turn_of(local, 3, c, r, shard()).epochs for c in "abcdefgh" for r in range(1, 41)}

    assert set(works.values()) == {None, 1, 2, 3}
    assert 0.4 < sum(work is not None for work in works.values()) / len(works) < 0.6
    assert works == {key: turn_of(local, 3, *key, shard()).epochs for key in works}
    assert works != {key: turn_of(local, 4, *key, shard()).epochs for key in works}
    late = next(key for key, work in works.items() if work == 2)
    net = Net(module())
    trainer = LeanTrainer(net, local, turn_of(local, 3, *late, shard()), carried(net))
    assert trainer.run(net.flat.clone()).steps == 2 * 5
    assert trainer.run(net.flat.clone(), epochs=3).steps == 3 * 5  # what a strategy asks for


@pytest.mark.parametrize("local", [{"epochs": 1}, {"epochs": 3, "steps": 5}])
def test_stragglers_need_epochs_to_do_less_of(local: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=r"set local\.epochs to 2 or more"):
        LocalTraining(stragglers=0.1, **local)
