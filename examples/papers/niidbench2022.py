"""Li et al. 2022 (ICDE, arXiv 2102.02079, NIID-Bench), Table 3, FCUBE: four parties, each with two opposite octants.

4,000 points in a cube, labelled by the side of the plane x₁ = 0; 1,000 to test on, uniform. The perceptron of the
authors' code (here a linear model), lr 0.01, B = 64, E = 10, 50 rounds, momentum 0.9 (SCAFFOLD: none, for which its
control variates hold).

    python examples/papers/niidbench2022.py            # about a minute
"""

from __future__ import annotations

from page import publish, spread, table

import shoal
from shoal.strategies.base import Strategy

SEEDS = (0, 1, 2)
STRATEGIES: dict[str, tuple[Strategy, float]] = {
    "FedAvg": (shoal.FedAvg(), 0.9),
    "FedProx μ = 0.01": (shoal.FedProx(mu=0.01), 0.9),
    "SCAFFOLD": (shoal.Scaffold(), 0.0),
    "FedNova": (shoal.FedNova(momentum=0.9), 0.9),
}


def accuracy(strategy: Strategy, momentum: float, seed: int, rounds: int = 50) -> float:
    experiment = shoal.Experiment(
        name="fcube",
        model="linear",
        data=shoal.datasets.load("fcube", draw=seed),
        strategy=strategy,
        local=shoal.LocalTraining(lr=0.01, batch_size=64, epochs=10, momentum=momentum),
        rounds=rounds,
        cohort=4,
        seed=seed,
    )
    return 100 * float(experiment.simulate(progress="none").metrics["test_accuracy"].iloc[-1])


def main() -> None:
    found = {name: [accuracy(*how, seed) for seed in SEEDS] for name, how in STRATEGIES.items()}
    rows = [["ours, last round, three seeds", *(f"{spread(values, '.2f')} %" for values in found.values())]]
    publish("niidbench2022", table(["FCUBE, test accuracy", *found], rows))


if __name__ == "__main__":
    main()
