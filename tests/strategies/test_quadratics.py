"""Fixed points that the papers' rules have on quadratics, to 1e-12.

A client that takes τ steps of size η on ½ h (x − e)² moves by (1 − (1 − ηh)^τ) (e − w): all of this file follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.protos.errors import InvalidUpdate
from shoal.strategies.base import Context, Mine, Scaled, Sent, State, Strategy, Terms, Trainer, vector
from shoal.strategies.ditto import Ditto
from shoal.strategies.fedadagrad import FedAdagrad
from shoal.strategies.fedadam import FedAdam
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fedavgm import FedAvgM
from shoal.strategies.feddyn import FedDyn
from shoal.strategies.fedexp import FedExP
from shoal.strategies.fednova import FedNova
from shoal.strategies.fedprox import FedProx
from shoal.strategies.fedyogi import FedYogi
from shoal.strategies.scaffold import Scaffold

Make = Callable[..., Any]
Simulate = Callable[..., tuple[State, list[Mine]]]
Bits = Callable[[Mapping[str, Tensor | float]], Mapping[str, bytes | float]]

EXACT = partial(pytest.approx, rel=0, abs=1e-12)
H, E, P, TAU, LR = (1.0, 2.0, 0.5), (0.0, 1.0, 4.0), (0.5, 0.3, 0.2), (2, 10, 30), 0.05
ALL: list[Strategy] = [FedAdagrad(), FedAdam(), FedAvg(), FedAvgM(), FedProx(), FedYogi(), Scaffold()]
ALL += [Scaffold(option=1), Ditto(), FedDyn(), FedExP(), FedNova(), FedNova(momentum=0.5)]


def double(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def mean(weights: list[float]) -> float:
    """The mean of the clients' optima under these weights."""
    return sum(w * e for w, e in zip(weights, E, strict=True)) / sum(weights)


@pytest.fixture
def three(quadratic: Make) -> list[Trainer]:
    """The three clients of the reference values; 500, 300 and 200 examples."""
    return [quadratic(double(h), double(e), 1000 * p, tau, LR) for h, e, p, tau in zip(H, E, P, TAU, strict=True)]


def test_fedavg_stops_at_its_fixed_point(three: list[Trainer], simulate: Simulate) -> None:
    """Not at the optimum 0.8333: unequal work pulls it to weights p (1 − (1 − ηh)^τ)."""
    state, _ = simulate(FedAvg(), three, 80, block=True)
    expected = mean([p * (1 - (1 - LR * h) ** tau) for h, p, tau in zip(H, P, TAU, strict=True)])
    assert float(vector(state, "parameters")) == EXACT(expected)
    assert expected == EXACT(1.771656796872)


def test_fedavg_uniform_ignores_the_number_of_examples(three: list[Trainer], simulate: Simulate) -> None:
    state, _ = simulate(FedAvg("uniform"), three, 80, block=True)
    expected = mean([1 - (1 - LR * h) ** tau for h, tau in zip(H, TAU, strict=True)])
    assert float(vector(state, "parameters")) == EXACT(expected)


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_fedprox_after_inexact_local_solves(mu: float, three: list[Trainer], simulate: Simulate) -> None:
    """The prox objective has curvature h + μ and its minimum at w + h (e − w) / (h + μ); τ steps go
    1 − (1 − η (h + μ))^τ of the way. So the fixed point weighs with p h (1 − (1 − η (h + μ))^τ) / (h + μ).
    """
    state, _ = simulate(FedProx(mu=mu), three, 90, block=True)
    expected = mean([p * h * (1 - (1 - LR * (h + mu)) ** tau) / (h + mu) for h, p, tau in zip(H, P, TAU, strict=True)])
    assert float(vector(state, "parameters")) == EXACT(expected)


def test_fedprox_after_exact_local_solves(quadratic: Make, simulate: Simulate) -> None:
    """Enough steps leave nothing of the local error: weights p h / (h + μ), whatever the amounts of work."""
    mu, work = 1.0, (45, 50, 60)
    clients = [quadratic(double(h), double(e), 10 * p, t, 0.5) for h, e, p, t in zip(H, E, P, work, strict=True)]
    state, _ = simulate(FedProx(mu=mu), clients, 45, block=True)
    assert float(vector(state, "parameters")) == EXACT(mean([p * h / (h + mu) for h, p in zip(H, P, strict=True)]))


def test_fedprox_zero_is_fedavg(quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    clients = quadratics(20)
    assert bits(simulate(FedProx(mu=0.0), clients, 3)[0]) == bits(simulate(FedAvg(), clients, 3)[0])


def test_fedprox_moves_clients_less(quadratics: Make, block: Make) -> None:
    """The term pulls towards the sent model: after two steps or more, every client has moved less."""
    clients, start = block([replace(c, steps=c.steps + 1) for c in quadratics(20)]), torch.zeros(5).double()
    near, free = (s.local(clients, Sent(start), {})[0].delta for s in (FedProx(mu=1.0), FedAvg()))
    assert (near.abs() < free.abs()).all()


def test_many_coordinates_at_once(quadratics: Make, simulate: Simulate) -> None:
    """FedAvg's fixed point holds in every coordinate of a vector, over two leaves of clients."""
    clients = quadratics(20)
    state, _ = simulate(FedAvg(), clients, 130, block=True)
    weights = [c.examples * (1 - (1 - c.lr * c.h) ** c.steps) for c in clients]
    expected = sum(w * c.e for w, c in zip(weights, clients, strict=True)) / sum(weights)
    assert (vector(state, "parameters") - expected).abs().max() < 1e-12


# --- SCAFFOLD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_reaches_the_optimum_after_unequal_work(option: Any, three: list[Trainer], simulate: Simulate) -> None:
    """The exact optimum of the mean over clients, Σ h e / Σ h, where FedAvg stops elsewhere; there the control
    variates are the clients' gradients and the server's is zero.
    """
    state, mine = simulate(Scaffold(option=option), three, 300, block=True)
    assert float(vector(state, "parameters")) == EXACT(mean(list(H)))
    assert mean(list(H)) == EXACT(1.142857142857)
    assert float(vector(state, "control")) == EXACT(0)
    for own, h, e in zip(mine, H, E, strict=True):
        assert float(own["control"]) == EXACT(h * (mean(list(H)) - e))


def test_scaffold_reaches_the_optimum_with_two_of_five(quadratics: Make, simulate: Simulate) -> None:
    """Partial participation, where other libraries' SCAFFOLD collapses."""
    clients = quadratics(5)
    cohorts = [(r % 5, (r + 1 + r % 2) % 5) for r in range(600)]
    state, _ = simulate(Scaffold(), clients, 600, cohorts=cohorts, block=True)
    optimum = sum(c.h * c.e for c in clients) / sum(c.h for c in clients)
    assert (vector(state, "parameters") - optimum).abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(cohorts=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True), min_size=1, max_size=6))
def test_scaffold_server_control_is_the_mean_of_all_clients(
    cohorts: list[list[int]], quadratics: Make, simulate: Simulate
) -> None:
    """c = mean cₖ over the population, those never asked included, for any cohorts of any sizes."""
    state, mine = simulate(Scaffold(), quadratics(7), len(cohorts), cohorts=cohorts)
    everyone = torch.stack([own["control"] for own in mine])
    assert (vector(state, "control") - everyone.mean(0)).abs().max() < 1e-12


def test_scaffold_one_round_by_hand(quadratic: Make) -> None:
    """Two of four clients; w = 2, c = 1. Every number is a short binary fraction, so equality is exact.

    ::

        A: c_A = 0, h = 1, e = 0, η = ½, 1 step:   y = 2 − ½ (2 − 0 + 1) = ½
           Δ = −3/2, Σ η = ½:                      c_A⁺ = 0 − 1 + 3 = 2 (the gradient at 2)
        B: c_B = 2, h = 2, e = 1, η = ¼, 2 steps:  y = 2 − ¼ (2 − 2 + 1) = 7/4, then 7/4 − ¼ (3/2 − 2 + 1) = 13/8
           Δ = −3/8, Σ η = ½:                      c_B⁺ = 2 − 1 + ¾ = 7/4 (the mean of the gradients 2 and 3/2)
        server, η_g = ½:                           w = 2 + ½ · (−3/2 − 3/8) / 2 = 49/32
                                                   c = 1 + (2 − ¼) / 4 = 23/16
    """
    strategy, context = Scaffold(server_lr=0.5), Context(round=0, population=4, asked=2)
    state = {"parameters": double(2), "control": double(1)}
    sent = strategy.send(state)
    a, mine_a = strategy.local(quadratic(double(1), double(0), 9.0, 1, 0.5), sent, {"control": double(0)})
    b, mine_b = strategy.local(quadratic(double(2), double(1), 1.0, 2, 0.25), sent, {"control": double(2)})
    assert (float(a.delta), float(a.tensors["control"]), float(mine_a["control"])) == (-1.5, 2, 2)
    assert (float(b.delta), float(b.tensors["control"]), float(mine_b["control"])) == (-0.375, -0.25, 1.75)
    terms = [strategy.contribute(state, update, context) for update in (a, b)]
    total = {name: vector(terms[0], name) + vector(terms[1], name) for name in terms[0]}
    after = strategy.finish(state, total, replace(context, counted=2))
    assert (float(vector(after, "parameters")), float(vector(after, "control"))) == (49 / 32, 23 / 16)


def test_scaffold_without_a_step_is_refused(quadratic: Make) -> None:
    """No step, no gradient seen: the estimate would be 0/0."""
    sent = Sent(double(1), {"control": double(3)})
    with pytest.raises(InvalidUpdate, match="at least one step"):
        Scaffold().local(quadratic(double(1), double(0), 5.0, 0), sent, {"control": double(2)})


class Local:
    """A declaration of local training."""

    def __init__(self, optimizer: str = "sgd", momentum: float = 0.0, clip: float | None = None) -> None:
        self.optimizer, self.momentum, self.nesterov, self.clip, self.weight_decay = (
            optimizer,
            momentum,
            False,
            clip,
            0.0,
        )


def test_scaffold_refuses_all_but_plain_sgd() -> None:
    assert Scaffold().refuses(Local()) is None
    for wrong in (Local("adam"), Local(momentum=0.9), Local(clip=1.0)):
        assert "plain SGD" in (Scaffold().refuses(wrong) or "")
        assert Scaffold(option=1).refuses(wrong) is None


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_block_gives_the_bits_of_its_clients(
    strategy: Strategy, dtype: torch.dtype, quadratics: Make, simulate: Simulate, bits: Bits
) -> None:
    """The same lines serve ``[P]`` and ``[K, P]``: state and every client's own are equal bit for bit."""
    clients = quadratics(20, dtype=dtype)
    one, mine_one = simulate(strategy, clients, 4)
    blocked, mine_blocked = simulate(strategy, clients, 4, block=True)
    assert bits(one) == bits(blocked)
    assert [bits(own) for own in mine_one] == [bits(own) for own in mine_blocked]


def multiplied(terms: Terms) -> Mapping[str, Tensor | float]:
    return {name: vector(terms, name) if isinstance(term, Scaled) else term for name, term in terms.items()}


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_a_block_contributes_the_terms_of_its_clients(
    strategy: Strategy, quadratics: Make, block: Make, bits: Bits
) -> None:
    clients, context = quadratics(5), Context(0, 5, 5)
    start = torch.zeros(5, dtype=torch.float64)
    state, mine = strategy.init(start), strategy.init_client(start)
    stacked = {name: torch.stack([own] * 5) for name, own in mine.items()}
    whole = strategy.contribute(state, strategy.local(block(clients), strategy.send(state), stacked)[0], context)
    for i, client in enumerate(clients):
        one = multiplied(strategy.contribute(state, strategy.local(client, strategy.send(state), mine)[0], context))
        row = {n: v[i] if isinstance(v, Tensor) else v for n, v in multiplied(whole).items()}
        assert bits({n: torch.as_tensor(v).flatten() for n, v in one.items()}) == bits(
            {n: torch.as_tensor(v).to(torch.as_tensor(one[n]).dtype).flatten() for n, v in row.items()}
        )


# --- the trainer itself ---------------------------------------------------------------------------------------------


def test_the_trainer_is_gradient_descent(quadratic: Make, block: Make) -> None:
    """Its gradient is that of its loss (autograd), and epochs, steps and drift mean what the protocol says."""
    one = quadratic(torch.tensor([1.0, 3.0]).double(), torch.tensor([2.0, -1.0]).double(), 7.0, 3, 0.125)
    at = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(one.loss(at), at)
    assert torch.equal(one.gradient(at), gradient)
    assert block([one, one]).loss(at.detach()).shape == (2, 1)
    start = at.detach()
    twice = one.run(start, epochs=2)
    assert (twice.examples, twice.steps, twice.lr_sum) == (7.0, 6, 0.75)
    halfway = start + one.run(start).delta
    assert torch.equal(start + twice.delta, halfway + one.run(halfway).delta)
    pull = torch.ones(2).double()
    assert torch.equal(one.run(start, drift=pull).delta, one.run(start, drift=lambda w: pull).delta)
