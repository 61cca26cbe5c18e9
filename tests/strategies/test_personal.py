"""Personalisation against closed forms on quadratics, to 1e-12 where there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net, layout_of, parameters_of
from shoal.client.participant import BUFFERS, Participant
from shoal.protos.errors import ExperimentError
from shoal.strategies import sharing
from shoal.strategies.apfl import APFL
from shoal.strategies.base import Mine, Sent, State, Strategy, vector
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fedavgm import FedAvgM
from shoal.strategies.fedbabu import FedBABU
from shoal.strategies.fedbn import FedBN
from shoal.strategies.fedper import FedPer
from shoal.strategies.fedrep import FedRep
from shoal.strategies.finetune import FineTune
from shoal.strategies.lgfedavg import LgFedAvg
from shoal.strategies.mimelite import MimeLite
from shoal.strategies.pfedme import PFedMe
from shoal.strategies.schedule import scheduled
from shoal.strategies.sums import Carried

Make = Callable[..., Any]
Simulate = Callable[..., tuple[State, list[Mine]]]
Bits = Callable[[Mapping[str, Tensor | float]], Mapping[str, bytes | float]]

EXACT = partial(pytest.approx, rel=0, abs=1e-12)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- parts of the model: the quadratics' last weight is their head ---------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "shared"),
    [
        (FedPer(), slice(0, 4)),
        (FedPer(head=("head.*",)), slice(0, 4)),
        (FedPer(head=("body.*",)), slice(4, 5)),
        (LgFedAvg(), slice(4, 5)),
        (LgFedAvg(head=("body.weight",)), slice(0, 4)),
        (FedBN(), slice(4, 5)),
    ],
    ids=str,
)
def test_what_is_shared_is_fedavgs_and_the_rest_each_clients_own(
    strategy: Any, shared: slice, quadratics: Make, simulate: Simulate
) -> None:
    """The coordinates of these quadratics are independent, so each part goes its own way."""
    clients = quadratics(6)
    own = [i for i in range(5) if i not in range(5)[shared]]
    state, mine = simulate(strategy, clients, 700, block=True)
    average, _ = simulate(FedAvg(), clients, 700, block=True)
    model, sent = vector(state, "parameters"), strategy.send(state)

    assert torch.equal(model[shared], vector(average, "parameters")[shared])
    assert not model[own].any()  # where it began: nothing of it has left a client
    for client, kept in zip(clients, mine, strict=True):
        personal = strategy.personal(client, sent, kept)
        assert torch.equal(personal[shared], model[shared])
        assert (personal[own] - client.e[own]).abs().max() < 1e-12


def test_everything_shared_is_fedavg_bit_for_bit(quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    clients = quadratics(6)
    assert bits(simulate(LgFedAvg(head=("*",)), clients, 5)[0]) == bits(simulate(FedAvg(), clients, 5)[0])


def test_fedrep_fits_the_head_first_and_then_the_body_alone(quadratics: Make) -> None:
    client = replace(quadratics(3)[0], steps=2)
    start, own = torch.zeros(5).double(), torch.ones(5).double()
    update, after = FedRep(head_epochs=3).local(client, Sent(start), {"model": own})
    shrunk = (1 - client.lr * client.h) ** torch.tensor([2, 2, 2, 2, 6])
    begun = torch.where(torch.arange(5) < 4, start, own)
    expected = client.e + shrunk * (begun - client.e)

    torch.testing.assert_close(after["model"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(update.delta[:4], expected[:4] - start[:4], rtol=0, atol=1e-12)
    assert update.delta[4] == 0 and update.steps == 2


def test_fedrep_with_one_pass_each_moves_as_fedper(quadratics: Make, simulate: Simulate) -> None:
    clients = quadratics(4)
    one, two = (simulate(s, clients, 6) for s in (FedRep(head_epochs=1), FedPer()))
    assert (vector(one[0], "parameters") - vector(two[0], "parameters")).abs().max() < 1e-12


def test_fedbabu_never_moves_the_head_until_it_fine_tunes(quadratics: Make, simulate: Simulate) -> None:
    clients, strategy = quadratics(6), FedBABU(finetune_epochs=700)
    state, mine = simulate(strategy, clients, 5, block=True)
    model, average = vector(state, "parameters"), simulate(FedAvg(), clients, 5, block=True)[0]

    assert torch.equal(model[:4], vector(average, "parameters")[:4]) and model[4] == 0
    assert mine == [{}] * 6
    for client in clients:
        assert (strategy.personal(client, Sent(model), {}) - client.e).abs().max() < 1e-12
        assert FedBABU(finetune_epochs=0).personal(client, Sent(model), {}) is model


def test_a_part_that_is_not_there(quadratics: Make) -> None:
    with pytest.raises(ExperimentError, match=r"called 'fc.\*'; the model has body.weight, head.weight"):
        FedPer(head=("fc.*",)).local(quadratics(1)[0], Sent(torch.zeros(5)), {"model": torch.zeros(5)})


def test_parts_of_a_real_model() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    layout, like = layout_of(net), torch.zeros(1)

    assert sharing.last_layer(layout) == ["4.weight", "4.bias"]
    assert sharing.norms(layout) == ["1.weight", "1.bias"]
    assert sharing.mask(layout, ["1.*"], like).nonzero().flatten().tolist() == [8, 9, 10, 11]
    with pytest.raises(ExperimentError, match="no batch normalisation"):
        sharing.norms(layout_of(nn.Linear(1, 1)))


def test_fedbn_keeps_statistics_with_the_client() -> None:
    """What goes out are the round's; the next task and the client's own evaluation begin with what it kept."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    values = parameters_of(module)
    carried = Carried(values.buffers, values.counters)
    x, y = torch.randn(20, 3) * 3 + 5, torch.arange(20) % 2
    data = Shard(x, y, x[:8], y[:8])
    player = Participant(Net(module), FedBN(), LocalTraining(lr=0.0001, batch_size=10), 0)
    sent = Sent(values.trainable.clone())
    update, mine = player.train("a", 1, data, sent, carried, None)

    assert torch.equal(update.buffers, carried.buffers)  # type: ignore[arg-type]
    assert not torch.equal(mine[BUFFERS], carried.buffers)
    _, later = player.train("a", 2, data, sent, carried, mine)
    assert (later[BUFFERS] - mine[BUFFERS]).abs().max() < (mine[BUFFERS] - carried.buffers).abs().max()
    measured = player.evaluate("a", 2, data, sent, carried, later)
    assert measured["loss"] != measured["global_loss"]
    assert measured["global_loss"] == player.evaluate("a", 2, data, sent, carried, None)["loss"]


# --- models of their own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lam", "inner_lr"), [(1.0, 0.4), (4.0, 0.18)])
def test_pfedme_models_stop_between_their_optimum_and_the_global_model(
    lam: float, inner_lr: float, quadratics: Make, simulate: Simulate
) -> None:
    """θ = (h e + λ w)/(h + λ); and w is the mean of clients' own w, which all descend the envelope."""
    clients = [replace(client, steps=1, lr=0.5) for client in quadratics(5)]
    strategy = PFedMe(lam=lam, inner_steps=36, inner_lr=inner_lr)
    state, mine = simulate(strategy, clients, 200, block=True)
    w, pull = vector(state, "parameters"), [lam * c.h / (c.h + lam) for c in clients]
    expected = sum(p * c.e for p, c in zip(pull, clients, strict=True)) / sum(pull)

    torch.testing.assert_close(w, expected, rtol=0, atol=1e-12)
    for client, own in zip(clients, mine, strict=True):
        theta = (client.h * client.e + lam * w) / (client.h + lam)
        torch.testing.assert_close(strategy.personal(client, strategy.send(state), own), theta, rtol=0, atol=1e-12)


def test_pfedme_mixes_by_beta(quadratics: Make, simulate: Simulate) -> None:
    clients = quadratics(3)
    one, half = (vector(simulate(PFedMe(beta=b), clients, 1)[0], "parameters") for b in (1.0, 0.5))
    assert torch.equal(half, one / 2)  # from zero


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_apfl_with_one_part_alone(alpha: float, quadratics: Make, simulate: Simulate) -> None:
    """Beside FedAvg's model a client's own is that, or a local one."""
    clients, strategy = quadratics(4), APFL(alpha=alpha, adapt=False)
    state, mine = simulate(strategy, clients, 700, block=True)
    average, _ = simulate(FedAvg(), clients, 700, block=True)

    torch.testing.assert_close(vector(state, "parameters"), vector(average, "parameters"), rtol=0, atol=1e-12)
    for client, own in zip(clients, mine, strict=True):
        assert float(own["alpha"]) == alpha
        expected = client.e if alpha else vector(state, "parameters")
        found = strategy.personal(client, strategy.send(state), own)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_apfl_one_step_by_hand(quadratic: Make) -> None:
    """h = 2, e = 1, η = ½; w = 3, v = 2, α = ½: v̄ = 5/2, ∇ = 3; v ← 2 − ½·½·3, α ← ½ − ½·(−1)·3 = 2, at most 1."""
    client, sent = quadratic(double(2), double(1), 1.0, 1, 0.5), Sent(double(3))
    update, own = APFL().local(client, sent, {"model": double(2), "alpha": double(0.5)})
    assert (float(update.delta), float(own["model"]), float(own["alpha"])) == (-2, 1.25, 1)
    _, other = APFL().local(client, sent, {"model": double(3.25), "alpha": double(0.5)})
    assert float(other["alpha"]) == 0  # ½ − ½·¼·(2·(3.125 − 1)) = −1/32, at least 0


def test_fine_tuning_ends_at_the_clients_optimum(quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    clients, strategy = quadratics(4), FineTune(epochs=700)
    state, _ = simulate(strategy, clients, 3)
    assert bits(state) == bits(simulate(FedAvg(), clients, 3)[0])
    for client in clients:
        assert (strategy.personal(client, strategy.send(state), {}) - client.e).abs().max() < 1e-12


# --- the server's momentum and learning rate -------------------------------------------------------------------------


def test_mimelite_without_momentum_is_fedavg_of_equal_weights(quadratics: Make, simulate: Simulate) -> None:
    clients = quadratics(6)
    mime, average = (simulate(s, clients, 5)[0] for s in (MimeLite(beta=0.0), FedAvg("uniform")))
    assert torch.equal(vector(mime, "parameters"), vector(average, "parameters"))


def test_mimelite_two_rounds_by_hand(quadratic: Make, simulate: Simulate) -> None:
    """One client, h = 1, e = 0, η = ½, β = ½, from w = 4: m is only moved by the server, by the gradient it sent from.

    ::

        round 1: m = 0:  4 → 2 → 1;  m = ½ · 4 = 2
        round 2: g + m:  1 − ½ (1 + 2) = −½, −½ − ½ (−½ + 2) = −5/4;  m = ½ · 2 + ½ · 1 = 3/2
    """
    client = quadratic(double(1), double(0), 1.0, 2, 0.5)
    state, _ = simulate(MimeLite(beta=0.5), [client], 2, state={"parameters": double(4), "momentum": double(0)})
    assert (float(vector(state, "parameters")), float(vector(state, "momentum"))) == (-1.25, 1.5)


def test_mimelite_wants_plain_sgd() -> None:
    assert MimeLite().refuses(SimpleNamespace(optimizer="sgd", momentum=0.9, clip=None))
    for strategy in (PFedMe(), APFL(), MimeLite()):
        assert strategy.refuses(SimpleNamespace(optimizer="sgd", momentum=0.0, weight_decay=0.1, clip=None))


def test_the_servers_learning_rate_warms_up_and_decays() -> None:
    assert [scheduled(8, 1.0, 0, r) for r in (1, 2, 50)] == [8, 8, 8]
    assert [scheduled(8, 0.5, 0, r) for r in (1, 2, 3)] == [8, 4, 2]
    assert [scheduled(8, 0.5, 4, r) for r in (1, 2, 3, 4, 5, 6)] == [2, 4, 6, 8, 4, 2]


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_every_server_optimizer_follows_its_schedule(name: str, quadratics: Make) -> None:
    """The step of round 3 is a quarter of what it would be without decay."""
    from shoal.protos import registry
    from shoal.strategies.base import Context
    from shoal.strategies.sums import contribute

    make, start, client = registry.load("shoal.strategies", name), torch.zeros(5).double(), quadratics(1)[0]

    def moved(strategy: Strategy) -> Tensor:
        state, context = strategy.init(start), Context(3, 1, 1, 1)
        update, _ = strategy.local(client, strategy.send(state), {})
        return vector(strategy.finish(state, contribute(strategy, state, update, context).terms, context), "parameters")

    torch.testing.assert_close(moved(make(server_lr_decay=0.5)), moved(make()) / 4, rtol=1e-12, atol=0)
    assert FedAvgM(server_lr_warmup=9) != FedAvgM()
