"""Li et al. 2020 (MLSys, arXiv 1812.06127), Figures 1 and 2: FedProx on Synthetic(α, β) with stragglers.

30 devices, 10 a round, logistic regression, lr 0.01, B = 10, E = 20; a straggler makes 1 to 19 epochs. FedAvg drops
stragglers, FedProx keeps what they did. 100 of the paper's 200 rounds. The
published data cannot be drawn again (no seed was set) and the draw moves the accuracy by more than the method does, so
there are five draws: the first five in which the devices have at most 10,000 examples together (in others one device
alone has tens of thousands, and would take a day). The mean over devices stands beside the mean over examples.

    python examples/papers/fedprox2020.py            # the rows that docs/results.md does not have
    python examples/papers/fedprox2020.py --anew     # all, in an hour or two
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

from page import publish, spread, standing, table

import shoal
from shoal.simulations.datasets import Dataset
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, number, vector

DRAWS, MOST, ROUNDS, EPOCHS, BATCH = 5, 10_000, 100, 20, 10


@dataclass(frozen=True)
class Dropping(Strategy):
    """FedAvg as the paper runs it: who has not made all epochs does not count."""

    citation = "Li et al. 2020, MLSys, Section 5.2"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        examples: Any = update.examples
        whole = (update.steps >= EPOCHS * -(-examples // BATCH)) * 1.0
        return {"delta": update.delta * (examples * whole), "weight": examples * whole}

    def finish(self, state: State, total: Terms, context: Context) -> State:
        weight = number(total, "weight")
        return {"parameters": vector(state, "parameters") + vector(total, "delta") / weight} if weight else state


METHODS: dict[str, Strategy] = {
    "FedAvg (drops)": Dropping(),
    "FedProx μ = 0": shoal.FedProx(mu=0.0),
    "FedProx μ = 1": shoal.FedProx(mu=1.0),
}
SETS = {"(0, 0)": (0.0, 0.0), "(0.5, 0.5)": (0.5, 0.5), "(1, 1)": (1.0, 1.0)}


def draws(alpha: float, beta: float) -> list[Dataset]:
    made = (
        shoal.datasets.load("synthetic", alpha=alpha, beta=beta, draw=draw, client_test=0.1)
        for draw in itertools.count()
    )
    return list(itertools.islice((data for data in made if len(data.train) <= MOST), DRAWS))


def run(data: Dataset, strategy: Strategy, stragglers: float, draw: int) -> tuple[float, float]:
    """Accuracy on all test examples, and its mean over devices, in percent."""
    experiment = shoal.Experiment(
        name="fedprox-synthetic",
        model="linear",
        data=data,
        strategy=strategy,
        local=shoal.LocalTraining(lr=0.01, batch_size=BATCH, epochs=EPOCHS, stragglers=stragglers),
        evaluation=shoal.Evaluation(every=0, clients_every=ROUNDS),
        rounds=ROUNDS,
        cohort=10,
        seed=draw,
    )
    last = experiment.simulate(workers=0, progress="none").metrics.iloc[-1]
    found = 100 * last["clients_accuracy_weighted"], 100 * last["clients_accuracy"]
    if not all(map(math.isfinite, found)):
        raise SystemExit(f"no accuracy: {last}")
    return found


def cells(stragglers: float, alpha: float, beta: float) -> list[str]:
    """Of each method: mean ± standard deviation over the draws, of both accuracies."""
    drawn = draws(alpha, beta)
    # With no straggler there is nobody to drop, so that the first two methods are one.
    methods = METHODS if stragglers else {m: s for m, s in METHODS.items() if s != Dropping()}
    found = {m: [run(d, s, stragglers, i) for i, d in enumerate(drawn)] for m, s in methods.items()}
    return [" / ".join(map(spread, zip(*found[m], strict=True))) if m in found else "as μ = 0" for m in METHODS]


def main() -> None:
    rows = {} if "--anew" in sys.argv else standing("fedprox2020")
    for stragglers in (0.0, 0.9, 0.5):
        for name, mixture in SETS.items():
            label = f"{name}, {stragglers:.0%} stragglers"
            if label not in rows:
                rows[label] = [label, *cells(stragglers, *mixture)]
                publish("fedprox2020", table(["Synthetic(α, β)", *METHODS], list(rows.values())))  # it takes hours


if __name__ == "__main__":
    main()
