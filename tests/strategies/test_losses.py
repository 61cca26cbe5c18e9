"""Strategies that change a batch's gradient or loss, beside the same rule written with PyTorch's own autograd."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.client.client import Client, FitTrainer, Work
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net, parameters_of
from shoal.client.trainer import LeanTrainer, turn_of
from shoal.protos.errors import ExperimentError
from shoal.strategies.base import Sent, Strategy
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fedlc import FedLC
from shoal.strategies.fedsam import FedSAM
from shoal.strategies.moon import Moon
from shoal.strategies.perfedavg import PerFedAvg, parts
from shoal.strategies.sums import Carried

LOCAL = LocalTraining(lr=0.2, batch_size=7, epochs=2)


def module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def shard(classes: int = 3) -> Shard:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, dtype=torch.float64, generator=generator)
    return Shard(x, torch.randint(0, classes, (24,), generator=generator))


def trainer(net: Net, data: Shard, make: Any = LeanTrainer) -> LeanTrainer:
    values = parameters_of(net.module)
    made: LeanTrainer = make(net, LOCAL, turn_of(LOCAL, 0, "a", 1, data), Carried(values.buffers, values.counters))
    return made


def delta(strategy: Strategy, data: Shard, mine: Any = None) -> tuple[Tensor, Any]:
    net = Net(module())
    sent = Sent(net.flat.clone())
    update, after = strategy.local(
        trainer(net, data), sent, strategy.init_client(sent.parameters) if mine is None else mine
    )
    return update.delta, after


def by_hand(step: Callable[[nn.Module, Tensor, Tensor], list[Tensor]], data: Shard) -> Tensor:
    """The same batches; ``step`` gives the direction for each parameter."""
    from shoal.client.trainer import declared_batches

    model = module()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for x, y in declared_batches(LOCAL, turn_of(LOCAL, 0, "a", 1, data), None):
        directions = step(model, x, y)
        with torch.no_grad():
            for p, g in zip(model.parameters(), directions, strict=True):
                p.sub_(LOCAL.lr * g)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def slope(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters())))


def moved(model: nn.Module, by: float, along: list[Tensor]) -> nn.Module:
    other = deepcopy(model)
    with torch.no_grad():
        for p, g in zip(other.parameters(), along, strict=True):
            p.add_(by * g)
    return other


def exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert a.abs().max() > 0


@pytest.mark.parametrize("strategy", [FedSAM(rho=0), FedLC(tau=0), Moon(mu=0)], ids=["fedsam", "fedlc", "moon"])
def test_without_its_term_it_is_fedavg_bit_for_bit(strategy: Strategy) -> None:
    assert torch.equal(delta(strategy, shard())[0], delta(FedAvg(), shard())[0])


def test_fedsam_descends_from_where_the_loss_is_highest() -> None:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        g = slope(model, x, y)
        norm = float(torch.cat([part.flatten() for part in g]).norm())
        return slope(moved(model, 0.3 / norm, g), x, y)

    exact(delta(FedSAM(rho=0.3), shard())[0], by_hand(step, shard()))


def test_fedlc_lowers_logits_of_what_is_rare() -> None:
    data = shard()
    counts = data.y.bincount(minlength=3).double()

    def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        loss = functional.cross_entropy(model(x) - 0.5 / counts**0.25, y)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    exact(delta(FedLC(tau=0.5), data)[0], by_hand(step, data))


def test_fedlc_leaves_a_class_alone_that_a_client_does_not_have() -> None:
    found, _ = delta(FedLC(), shard(classes=2))
    weight, bias = found[30:48].view(3, 6), found[48:]

    assert found.isfinite().all() and found.abs().max() > 0
    assert not weight[2].any() and not bias[2]


def test_fedlc_wants_class_numbers() -> None:
    net, data = Net(module()), shard()
    with pytest.raises(ExperimentError, match="class numbers"):
        FedLC().local(trainer(net, Shard(data.x, data.x)), Sent(net.flat.clone()), {})


def test_moon_is_drawn_to_the_global_model_and_away_from_its_own() -> None:
    """The last own model is another one, else the contrast is a constant."""
    data, base, last = shard(), module(), moved(module(), 0.5, list(module().parameters()))
    own = torch.cat([p.detach().flatten() for p in last.parameters()])

    def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        z, near, far = (m[:2](x) for m in (model, base, last))  # type: ignore[index]
        positive, negative = (torch.exp(functional.cosine_similarity(z, w.detach()) / 0.5) for w in (near, far))
        loss = functional.cross_entropy(model(x), y) - 2 * torch.log(positive / (positive + negative)).mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    found, after = delta(Moon(mu=2.0), data, {"model": own})
    exact(found, by_hand(step, data))
    assert torch.equal(after["model"], parameters_of(base).trainable + found)


def test_moons_first_round_is_fedavg() -> None:
    """A client without a past has the global model as its last: both pulls cancel."""
    exact(delta(Moon(mu=5.0), shard())[0], delta(FedAvg(), shard())[0])


def test_a_model_without_a_dense_layer_has_no_features() -> None:
    net = Net(nn.Sequential(nn.Conv1d(1, 3, 4), nn.Flatten()).double())
    data = shard()
    with pytest.raises(ExperimentError, match="dense layer"):
        Moon().local(trainer(net, Shard(data.x.unsqueeze(1), data.y)), Sent(net.flat), {"model": net.flat.clone()})


@pytest.mark.parametrize("variant", ["first-order", "hessian-free"])
def test_perfedavg_as_it_is_written(variant: Any) -> None:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        first, second, *third = parts(len(x), 2 if variant == "first-order" else 3)
        g = slope(moved(model, -0.1, slope(model, x[first], y[first])), x[second], y[second])
        if not third:
            return g
        up, down = (slope(moved(model, d, g), x[third[0]], y[third[0]]) for d in (1e-3, -1e-3))
        return [a - 0.1 * (b - c) / 2e-3 for a, b, c in zip(g, up, down, strict=True)]

    found, _ = delta(PerFedAvg(alpha=0.1, variant=variant), shard())
    torch.testing.assert_close(found, by_hand(step, shard()), rtol=0, atol=1e-10)


def test_hessian_free_is_maml_on_a_quadratic(quadratic: Callable[..., Any]) -> None:
    """∇ f(w − α ∇f(w)) with its Hessian, h (1 − α h)² (w − e), where differences are exact."""
    h, e, w = (torch.tensor([value], dtype=torch.float64) for value in (2.0, 1.0, 4.0))
    client = quadratic(h, e, 1.0, 1, 0.1)
    update, _ = PerFedAvg(alpha=0.25).local(client, Sent(w), {})
    assert float(update.delta) == pytest.approx(-0.1 * 2 * (1 - 0.25 * 2) ** 2 * 3, abs=1e-10)
    assert float(PerFedAvg(alpha=0.25).personal(client, Sent(w), {})) == 4 - 0.25 * 2 * 3


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("count", [2, 3])
def test_no_part_of_a_batch_is_empty(size: int, count: int) -> None:
    rows = [list(range(size))[part] for part in parts(size, count)]
    assert len(rows) == count and all(rows)
    if size >= count:
        assert [row for part in rows for row in part] == list(range(size))


def test_a_fit_of_ones_own_is_refused() -> None:
    class Mine(Client):
        def fit(self, work: Work) -> None:
            raise AssertionError("must not be called")

    def make(*given: Any) -> FitTrainer:
        return FitTrainer(Mine(), FedSAM(), *given)

    net = Net(module())
    with pytest.raises(ExperimentError, match="FedSAM trains in a way of its own"):
        FedSAM().local(trainer(net, shard(), make), Sent(net.flat.clone()), {})
