"""Li et al. 2022 (ICDE, arXiv 2102.02079, NIID-Bench), Table 3, FCUBE: four parties, each with two opposite octants.

4,000 points in a cube, labelled by the side of the plane x₁ = 0; 1,000 to test on, uniform. The perceptron of the
authors' code (here a linear model), lr 0.01, B = 64, E = 10, 50 rounds, momentum 0.9 (SCAFFOLD: none, for which its
control variates hold).

    python examples/papers/niidbench2022.py            # about a minute
"""

from __future__ import annotations

import numpy as np
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


def cube(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points in [−1, 1]³ and the side of x₁ = 0."""
    x = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def data(seed: int) -> shoal.datasets.Dataset:
    """A party holds an octant and the one that is symmetric to it about the origin."""
    rng = np.random.default_rng(seed)
    x, y = cube(4000, rng)
    octant = (x > 0) @ np.array([4, 2, 1])
    parties = np.minimum(octant, 7 - octant)
    return shoal.datasets.from_arrays(x, y, clients=parties, partition=shoal.Natural(), test=cube(1000, rng))


def accuracy(strategy: Strategy, momentum: float, seed: int, rounds: int = 50) -> float:
    experiment = shoal.Experiment(
        name="fcube",
        model="linear",
        data=data(seed),
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
