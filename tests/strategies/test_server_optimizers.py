"""FedAvgM, FedAdagrad, FedAdam and FedYogi against the papers' algorithms, and against Flower's own strategies.

Flower (flwr 1.41, ``flwr/serverapp/strategy``) differs from Reddi et al. 2021, Algorithm 2, in two places, and Shoal
follows the paper:

- ``fedadam.py``, ``fedyogi.py``, ``fedadagrad.py`` start v at 0; the paper wants v₋₁ ≥ τ²;
- ``fedadam.py`` multiplies η by √(1 − β₂^{t+1}) / (1 − β₁^{t+1}) with t the round, from 1 on. The paper has no bias
  correction, and Adam's own (Kingma & Ba) takes the power t, so Flower's is one step ahead of it.

With those two undone, every rule is equal to 1e-12. Flower also puts BatchNorm statistics through the server optimizer
and divides by zero where no client counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from shoal.protos.errors import RoundError
from shoal.strategies.base import Context, State, Strategy, Update, vector
from shoal.strategies.fedadagrad import FedAdagrad
from shoal.strategies.fedadam import FedAdam
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fedavgm import FedAvgM
from shoal.strategies.fedyogi import FedYogi
from shoal.strategies.sums import Carried, add_up, carry, contribute

Vector = np.ndarray[Any, np.dtype[np.float64]]
ROUNDS, SIZE = 6, 7
EXAMPLES = (30, 1, 12)
TAU2 = 1e-6  # (1e-3)²: where the paper's v starts
RNG = np.random.default_rng(0)
START = RNG.normal(size=SIZE)
# One array [clients, SIZE] a round. The scales make Δ² smaller and larger than v by turns: both signs of FedYogi.
DELTAS = [RNG.normal(size=(len(EXAMPLES), SIZE)) * 10.0 ** RNG.uniform(-4, 0, SIZE) for _ in range(ROUNDS)]


def close(a: Vector, b: Vector) -> bool:
    return bool(np.abs(a - b).max() < 1e-12)


def shoal_round(strategy: Strategy, state: State, deltas: Vector, examples: Sequence[float] = EXAMPLES) -> State:
    context = Context(0, len(examples), len(examples))
    updates = [Update(torch.from_numpy(d), float(n)) for d, n in zip(deltas, examples, strict=True)]
    total = add_up(contribute(strategy, state, update, context) for update in updates)
    assert total is not None
    return strategy.finish(state, total.terms, replace(context, counted=len(updates)))


def shoal_rounds(strategy: Strategy) -> list[Vector]:
    """The parameters after each round."""
    state, path = strategy.init(torch.from_numpy(START)), []
    for deltas in DELTAS:
        state = shoal_round(strategy, state, deltas)
        path.append(vector(state, "parameters").numpy())
    return path


# --- the papers -----------------------------------------------------------------------------------------------------


def paper_adaptive(rule: str, lr: float, beta1: float, beta2: float, tau: float) -> Iterator[Vector]:
    """Reddi et al. 2021, Algorithm 2, with Δₜ the mean weighted by examples."""
    x, m, v = START.copy(), np.zeros(SIZE), np.full(SIZE, tau**2)
    for deltas in DELTAS:
        delta = np.average(deltas, axis=0, weights=EXAMPLES)
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + lr * m / (np.sqrt(v) + tau)
        yield x


@pytest.mark.parametrize(
    "lr, beta1, beta2, tau", [(0.1, 0.9, 0.99, 1e-3), (0.03, 0.0, 0.9, 0.1), (1.0, 0.5, 0.0, 1e-2)]
)
@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_algorithm_2(rule: str, lr: float, beta1: float, beta2: float, tau: float) -> None:
    strategy: Strategy
    if rule == "adagrad":
        strategy = FedAdagrad(lr, beta1, tau)
    else:
        strategy = (FedAdam if rule == "adam" else FedYogi)(lr, beta1, beta2, tau)
    ours = shoal_rounds(strategy)
    assert all(close(a, b) for a, b in zip(ours, paper_adaptive(rule, lr, beta1, beta2, tau), strict=True))


def test_yogi_sees_both_signs() -> None:
    """The deltas above exercise v > Δ² and v < Δ²; at equality v stays."""
    state, signs = FedYogi().init(torch.from_numpy(START)), set()
    for deltas in DELTAS:
        delta = torch.from_numpy(np.average(deltas, axis=0, weights=EXAMPLES))
        signs |= set((vector(state, "second") - delta**2).sign().tolist())
        state = shoal_round(FedYogi(), state, deltas)
    assert signs == {-1.0, 1.0}
    strategy = FedYogi(tau=0.5)
    state = shoal_round(strategy, strategy.init(torch.zeros(2).double()), np.array([[0.5, -0.5]]), [1])
    assert vector(state, "second").tolist() == [0.25, 0.25]


def test_the_first_step_of_fedadam_by_hand() -> None:
    """Δ = 3, τ = 4, v₋₁ = 16, β₁ = ½, β₂ = ¾: m = 3/2, v = 12 + 9/4 = 57/4, w = η m / (√v + τ)."""
    strategy = FedAdam(server_lr=1.0, beta1=0.5, beta2=0.75, tau=4.0)
    state = shoal_round(strategy, strategy.init(torch.zeros(1).double()), np.array([[3.0]]), [5])
    assert (float(vector(state, "momentum")), float(vector(state, "second"))) == (1.5, 14.25)
    assert float(vector(state, "parameters")) == pytest.approx(1.5 / (14.25**0.5 + 4), rel=0, abs=1e-15)


@pytest.mark.parametrize("momentum, lr", [(0.9, 1.0), (0.5, 0.3), (0.0, 0.7)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm(momentum: float, lr: float, nesterov: bool) -> None:
    """Hsu et al. 2019: v ← β v + Δ, w ← w + η v. Nesterov's w ← w + η (Δ + β v) is the convention of PyTorch's SGD."""
    ours = shoal_rounds(FedAvgM(lr, momentum, nesterov))
    x, v = START.copy(), np.zeros(SIZE)
    for mine, deltas in zip(ours, DELTAS, strict=True):
        delta = np.average(deltas, axis=0, weights=EXAMPLES)
        v = momentum * v + delta
        x = x + lr * (delta + momentum * v if nesterov else v)
        assert close(mine, x)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_without_momentum_is_fedavg(nesterov: bool) -> None:
    plain, heavy = shoal_rounds(FedAvg()), shoal_rounds(FedAvgM(server_lr=1.0, momentum=0.0, nesterov=nesterov))
    assert [x.tobytes() for x in plain] == [x.tobytes() for x in heavy]


def test_fedavg_by_hand() -> None:
    """McMahan et al. 2017: (30 · 1 + 10 · 5) / 40 = 2."""
    state = shoal_round(FedAvg(), FedAvg().init(torch.ones(1).double()), np.array([[1.0], [5.0]]), [30, 10])
    assert float(vector(state, "parameters")) == 3.0
    uniform = FedAvg("uniform")
    state = shoal_round(uniform, uniform.init(torch.ones(1).double()), np.array([[1.0], [5.0]]), [30, 10])
    assert float(vector(state, "parameters")) == 4.0


# --- Flower ---------------------------------------------------------------------------------------------------------


class Grid:
    """Three nodes, always there: all that Flower's strategies ask of a grid."""

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]


@dataclass(frozen=True)
class Flower:
    """Drives one of flwr's strategies as its own server does: configure_train, replies, aggregate_train."""

    app: Any
    strategies: Any

    def round(self, strategy: Any, number: int, x: Vector, deltas: Vector, examples: Sequence[float]) -> Vector:
        app = self.app
        arrays = app.ArrayRecord({"w": app.Array(x)})
        replies = []
        asked = strategy.configure_train(number, arrays, app.ConfigRecord(), Grid())
        for task, delta, n in zip(asked, deltas, examples, strict=True):
            content = app.RecordDict(
                {"arrays": app.ArrayRecord({"w": app.Array(x + delta)}), "m": app.MetricRecord({"num-examples": n})}
            )
            replies.append(app.Message(content, reply_to=task))
        result: Vector = strategy.aggregate_train(number, replies)[0]["w"].numpy()
        return result

    def rounds(self, strategy: Any, before: Callable[[Any, int], None] = lambda strategy, number: None) -> list[Vector]:
        """The parameters after each round; ``before`` may correct the strategy before each."""
        x, path = START, []
        for number, deltas in enumerate(DELTAS, start=1):
            before(strategy, number)
            x = self.round(strategy, number, x, deltas, EXAMPLES)
            path.append(x)
        return path


@pytest.fixture(scope="module")
def flower() -> Iterator[Flower]:
    """flwr with its telemetry off. Its import warns (typer's use of click), which is not ours to fail on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            app, strategies = import_module("flwr.app"), import_module("flwr.serverapp.strategy")
        if find_spec("flwr.supercore.task_identity"):  # where it exists, no Message can be built without it
            identity = import_module("flwr.supercore.task_identity").TaskIdentity
            for name in ("_run_id", "_node_id", "_task_id"):
                patch.setattr(identity, name, 1)
        yield Flower(app, strategies)


def paper_start(strategy: Any, number: int) -> None:
    """v₋₁ = τ² in place of Flower's 0."""
    if number == 1:
        strategy.v_t = {"w": np.full(SIZE, strategy.tau**2)}


def correction(number: int) -> float:
    """What Flower's FedAdam multiplies η by in a round, at β₁ = 0.9 and β₂ = 0.99."""
    return float(np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1)))


def test_flower_fedavg_is_ours(flower: Flower) -> None:
    theirs = flower.rounds(flower.strategies.FedAvg())
    assert all(close(a, b) for a, b in zip(shoal_rounds(FedAvg()), theirs, strict=True))


@pytest.mark.parametrize("momentum, lr", [(0.9, 1.0), (0.5, 0.3), (0.0, 0.7)])
def test_flower_fedavgm_is_ours_without_nesterov(flower: Flower, momentum: float, lr: float) -> None:
    """Flower has the plain form only."""
    theirs = flower.rounds(flower.strategies.FedAvgM(server_learning_rate=lr, server_momentum=momentum))
    assert all(close(a, b) for a, b in zip(shoal_rounds(FedAvgM(lr, momentum)), theirs, strict=True))


@pytest.mark.parametrize("name", ["FedAdagrad", "FedYogi"])
def test_flower_is_ours_once_v_starts_where_the_paper_says(flower: Flower, name: str) -> None:
    """Flower starts v at 0 (``np.zeros_like``), so its first rounds differ; with v₋₁ = τ² all rounds are equal."""
    ours = shoal_rounds({"FedAdagrad": FedAdagrad(), "FedYogi": FedYogi()}[name])
    make = getattr(flower.strategies, name)
    assert all(close(a, b) for a, b in zip(ours, flower.rounds(make(), paper_start), strict=True))
    assert not close(ours[0], flower.rounds(make())[0])


def test_flower_fedadam_is_ours_without_its_bias_correction(flower: Flower) -> None:
    """Flower's FedAdam needs both undone: v₋₁ = τ², and η divided by its correction."""

    def undo(strategy: Any, number: int) -> None:
        paper_start(strategy, number)
        strategy.eta = 0.1 / correction(number)

    ours = shoal_rounds(FedAdam())
    assert all(close(a, b) for a, b in zip(ours, flower.rounds(flower.strategies.FedAdam(), undo), strict=True))


def test_flower_fedadam_takes_another_first_step(flower: Flower) -> None:
    """Where v₋₁ is the paper's, Flower's first step is 0.742 of the paper's; Adam's own correction would make it 1."""
    make = flower.strategies.FedAdam
    ours, theirs = shoal_rounds(FedAdam())[0], flower.rounds(make(), paper_start)[0]
    assert close(theirs - START, correction(1) * (ours - START))
    assert correction(1) == pytest.approx(0.7425, abs=1e-4)
    adam = np.sqrt(1 - 0.99) / (1 - 0.9)
    assert adam == pytest.approx(1.0)
    # Untouched, with v₋₁ = 0, the step is η c (1 − β₁) Δ / (√((1 − β₂) Δ²) + τ).
    delta = np.average(DELTAS[0], axis=0, weights=EXAMPLES)
    first = START + 0.1 * correction(1) * 0.1 * delta / (0.1 * np.abs(delta) + 1e-3)
    assert close(flower.rounds(make())[0], first)
    assert not close(ours, first)


def test_flower_starts_v_at_zero(flower: Flower) -> None:
    """After one round with Δ its v is exactly Δ² (Adagrad) or (1 − β₂) Δ² (Adam, Yogi): nothing of τ² is in it."""
    delta = np.average(DELTAS[0], axis=0, weights=EXAMPLES)
    for name, expected in {"FedAdagrad": delta**2, "FedAdam": 0.01 * delta**2, "FedYogi": 0.01 * delta**2}.items():
        strategy = getattr(flower.strategies, name)()
        flower.round(strategy, 1, START, DELTAS[0], EXAMPLES)
        assert close(strategy.v_t["w"], expected)
    ours = shoal_round(FedAdagrad(), FedAdagrad().init(torch.from_numpy(START)), DELTAS[0])
    assert close(vector(ours, "second").numpy(), TAU2 + delta**2)


def test_flower_makes_variances_negative(flower: Flower) -> None:
    """Flower's server optimizers act on every array, BatchNorm's running variance too: here it falls to −0.05 though
    each client reports 0.02. Shoal averages buffers and lets no optimizer near them.
    """
    before, after = np.full(1, 0.03), 0.02
    shift = np.full((3, 1), after - before[0])
    assert flower.round(flower.strategies.FedAdagrad(), 1, before, shift, EXAMPLES)[0] < -0.05
    update = Update(torch.zeros(1).double(), 4.0, buffers=torch.tensor([after], dtype=torch.float64))
    state = FedAdagrad().init(torch.zeros(1).double())
    total = add_up(contribute(FedAdagrad(), state, update, Context(0, 3, 3)) for _ in EXAMPLES)
    assert total is not None
    variance = carry(Carried(torch.from_numpy(before), torch.zeros(0)), total).buffers
    assert float(variance) == pytest.approx(after, rel=0, abs=1e-15)


def test_flower_divides_by_zero_where_no_example_counts(flower: Flower) -> None:
    with pytest.raises(ZeroDivisionError):
        flower.round(flower.strategies.FedAvg(), 1, START, DELTAS[0], [0, 0, 0])
    with pytest.raises(RoundError, match="positive number of examples"):
        shoal_round(FedAvg(), FedAvg().init(torch.from_numpy(START)), DELTAS[0], [0, 0, 0])
