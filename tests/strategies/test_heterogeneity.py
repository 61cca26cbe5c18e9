"""FedNova, FedDyn, FedExP and Ditto against their papers' closed forms, to 1e-12 where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.protos.errors import InvalidUpdate
from shoal.strategies.base import Context, Mine, Sent, State, Trainer, Update, vector
from shoal.strategies.ditto import Ditto
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.feddyn import FedDyn
from shoal.strategies.fedexp import FedExP
from shoal.strategies.fednova import FedNova
from shoal.strategies.sums import add_up, contribute

Make = Callable[..., Any]
Simulate = Callable[..., tuple[State, list[Mine]]]
Bits = Callable[[Mapping[str, Tensor | float]], Mapping[str, bytes | float]]

EXACT = partial(pytest.approx, rel=0, abs=1e-12)
H, E, P, TAU, LR = (1.0, 2.0, 0.5), (0.0, 1.0, 4.0), (0.5, 0.3, 0.2), (2, 10, 30), 0.05
OPTIMUM = sum(h * e for h, e in zip(H, E, strict=True)) / sum(H)  # of the mean over clients


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def finished(strategy: Any, state: State, updates: list[Update], population: int) -> State:
    context = Context(1, population, len(updates))
    total = add_up(contribute(strategy, state, update, context) for update in updates)
    assert total is not None
    after: State = strategy.finish(state, total.terms, replace(context, counted=len(updates)))
    return after


@pytest.fixture
def three(quadratic: Make) -> list[Trainer]:
    return [quadratic(double(h), double(e), 1000 * p, tau, LR) for h, e, p, tau in zip(H, E, P, TAU, strict=True)]


# --- FedNova ---------------------------------------------------------------------------------------------------------


def test_fednova_stops_at_its_fixed_point(three: list[Trainer], simulate: Simulate) -> None:
    """Weights p (1 − (1 − ηh)^τ) / τ: near the optimum 0.8333, where FedAvg stops at 1.77."""
    state, _ = simulate(FedNova(), three, 400, block=True)
    weights = [p * (1 - (1 - LR * h) ** tau) / tau for h, p, tau in zip(H, P, TAU, strict=True)]
    expected = sum(w * e for w, e in zip(weights, E, strict=True)) / sum(weights)
    assert float(vector(state, "parameters")) == EXACT(expected)
    assert expected == EXACT(0.710659866270)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fednova_after_equal_work_is_fedavg(weighting: Any, quadratics: Make, simulate: Simulate) -> None:
    clients = [replace(client, steps=3) for client in quadratics(20)]
    nova, _ = simulate(FedNova(weighting=weighting), clients, 5)
    average, _ = simulate(FedAvg(weighting), clients, 5)
    assert (vector(nova, "parameters") - vector(average, "parameters")).abs().max() < 1e-14


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_fednova_divides_by_what_constant_gradients_move(rho: float, steps: int) -> None:
    """‖a‖₁ is how far τ steps of SGD with momentum go under the gradient 1 and the learning rate 1."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=rho)
    for _ in range(steps):
        w.grad = torch.ones_like(w)
        optimizer.step()
    moved = w.detach()
    update = Update(moved, 1.0, steps, float(steps))
    after = finished(FedNova(momentum=rho), {"parameters": double(0)}, [update, replace(update, delta=double(0))], 2)
    terms = FedNova(momentum=rho).contribute({}, update, Context(0, 1, 1))
    assert float(vector(terms, "delta")) == EXACT(-1)
    assert float(vector(after, "parameters")) == EXACT(float(moved) / 2)


def test_fednova_wants_to_know_the_momentum() -> None:
    def local(**changes: Any) -> Any:
        return SimpleNamespace(**{"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "clip": None} | changes)

    assert FedNova(momentum=0.9).refuses(local(momentum=0.9)) is None
    assert "0.9" in (FedNova().refuses(local(momentum=0.9)) or "")
    for wrong in (local(optimizer="adam"), local(clip=1.0)):
        assert "SGD only" in (FedNova().refuses(wrong) or "")
    assert "Nesterov" in (FedNova(momentum=0.9).refuses(local(momentum=0.9, nesterov=True)) or "")


def test_fednova_without_a_step_is_refused(quadratic: Make) -> None:
    update, _ = FedNova().local(quadratic(double(1), double(0), 5.0, 0), Sent(double(1)), {})
    for steps in (update.steps, 0, 0.5):
        with pytest.raises(InvalidUpdate, match="number of steps, and a client made 0"):
            FedNova().contribute({}, replace(update, steps=steps), Context(0, 1, 1))


# --- FedDyn ----------------------------------------------------------------------------------------------------------


def test_feddyn_reaches_the_optimum_after_unequal_work(three: list[Trainer], simulate: Simulate) -> None:
    """There every client's kept gradient is that of its own loss, and they sum to zero."""
    state, mine = simulate(FedDyn(alpha=0.3), three, 1500, block=True)
    assert float(vector(state, "parameters")) == EXACT(OPTIMUM)
    assert float(vector(state, "correction")) == EXACT(0)
    for own, h, e in zip(mine, H, E, strict=True):
        assert float(own["gradient"]) == EXACT(h * (OPTIMUM - e))


def test_feddyn_reaches_the_optimum_with_two_of_five(quadratics: Make, simulate: Simulate) -> None:
    clients = quadratics(5)
    cohorts = [(r % 5, (r + 1 + r % 2) % 5) for r in range(1500)]
    state, _ = simulate(FedDyn(alpha=1.0), clients, 1500, cohorts=cohorts, block=True)
    optimum = sum(c.h * c.e for c in clients) / sum(c.h for c in clients)
    assert (vector(state, "parameters") - optimum).abs().max() < 1e-12


def test_feddyn_one_round_by_hand(quadratic: Make) -> None:
    """Two of four clients; w = 2, h = 1, α = ½. Every number is a short binary fraction, so equality is exact.

    ::

        A: g_A = 0, h = 1, e = 0, η = ½, 1 step:   y = 2 − ½ (2 − 0 + 0) = 1              Δ = −1, g_A⁺ = ½
        B: g_B = 1, h = 2, e = 1, η = ¼, 2 steps:  y = 2 − ¼ (2 − 1 + 0) = 7/4,
                                                   then 7/4 − ¼ (3/2 − 1 − 1/8) = 53/32   Δ = −11/32, g_B⁺ = 75/64
        server:  h = 1 − ½ (−43/32) / 4 = 299/256,  w = 2 − 43/64 − 2 · 299/256 = −129/128
    """
    strategy = FedDyn(alpha=0.5)
    state = {"parameters": double(2), "correction": double(1)}
    sent = strategy.send(state)
    a, mine_a = strategy.local(quadratic(double(1), double(0), 9.0, 1, 0.5), sent, {"gradient": double(0)})
    b, mine_b = strategy.local(quadratic(double(2), double(1), 1.0, 2, 0.25), sent, {"gradient": double(1)})
    assert (float(a.delta), float(mine_a["gradient"])) == (-1, 0.5)
    assert (float(b.delta), float(mine_b["gradient"])) == (-11 / 32, 75 / 64)
    after = finished(strategy, state, [a, b], population=4)
    assert float(vector(after, "correction")) == 299 / 256
    assert float(vector(after, "parameters")) == 2 - 43 / 64 - 2 * 299 / 256


# --- FedExP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 6])
def test_fedexp_of_orthogonal_clients(count: int) -> None:
    """Their mean has 1/m of their squared norm, so η = m / 2, but at least 1."""
    updates = [Update(3 * row, 1.0, 1, 0.1) for row in torch.eye(count, dtype=torch.float64)]
    state = {"parameters": torch.zeros(count, dtype=torch.float64)}
    after = finished(FedExP(epsilon=0.0), state, updates, count)
    expected = torch.full((count,), max(1.0, count / 2) * 3 / count, dtype=torch.float64)
    torch.testing.assert_close(vector(after, "parameters"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fedexp_as_it_is_written(weighting: Any, quadratics: Make) -> None:
    clients, start = quadratics(7), torch.zeros(5, dtype=torch.float64)
    updates = [client.run(start) for client in clients]
    weights = [client.examples if weighting == "examples" else 1.0 for client in clients]
    p = [weight / sum(weights) for weight in weights]
    mean = sum(share * update.delta for share, update in zip(p, updates, strict=True))
    squares = sum(share * float(update.delta @ update.delta) for share, update in zip(p, updates, strict=True))
    lr = max(1.0, squares / (2 * (float(mean @ mean) + 1e-3)))
    after = finished(FedExP(weighting=weighting), {"parameters": start}, updates, 7)
    torch.testing.assert_close(vector(after, "parameters"), lr * mean, rtol=0, atol=1e-12)


def test_fedexp_of_one_client_is_fedavg(quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    clients = quadratics(1)
    assert bits(simulate(FedExP(), clients, 3)[0]) == bits(simulate(FedAvg("uniform"), clients, 3)[0])


# --- Ditto -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_ditto_personal_models_stop_between_their_optimum_and_the_global_model(
    lam: float, three: list[Trainer], simulate: Simulate, bits: Bits
) -> None:
    """v = (h e + λ w) / (h + λ), beside the global model of FedAvg, bit for bit."""
    strategy = Ditto(lam=lam, personal_epochs=20)
    state, mine = simulate(strategy, three, 90, block=True)
    assert bits(state) == bits(simulate(FedAvg(), three, 90, block=True)[0])
    w = float(vector(state, "parameters"))
    for own, h, e in zip(mine, H, E, strict=True):
        assert float(own["model"]) == EXACT((h * e + lam * w) / (h + lam))
        assert torch.equal(strategy.personal(three[0], strategy.send(state), own), own["model"])
