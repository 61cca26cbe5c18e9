"""What federation costs where clients are alike: FedAvg on an IID split beside the same model trained centrally.

Same subset of Fashion-MNIST, same CNN, same initial weights; accuracy on the 1,000 test images, over three seeds. The
central model is given the better of two learning rates, so that it is no straw man.

Run it (about five minutes on two cores):  python examples/iid_against_central.py
"""

from __future__ import annotations

from statistics import fmean, stdev

import shoal

SEEDS = (0, 1, 2)


def experiment(clients: int, cohort: int, rounds: int, epochs: int, lr: float, seed: int) -> shoal.Experiment:
    return shoal.Experiment(
        name=f"iid-{clients}-clients",
        model="cnn",
        data=shoal.datasets.load("fashion-mnist-subset", partition=shoal.Iid(clients)),
        strategy=shoal.FedAvg(),
        local=shoal.LocalTraining(lr=lr, batch_size=10, epochs=epochs),
        rounds=rounds,
        cohort=cohort,
        seed=seed,
    )


def accuracy(**changes: float) -> list[float]:
    """The mean over the last ten rounds, for each seed."""
    runs = [experiment(seed=seed, **changes).simulate(progress="none") for seed in SEEDS]  # type: ignore[arg-type]
    return [float(run.metrics["test_accuracy"].iloc[-10:].mean()) for run in runs]


def main() -> None:
    """One client that holds everything is central training: a round is an epoch."""
    central = max(
        (accuracy(clients=1, cohort=1, rounds=20, epochs=1, lr=lr) for lr in (0.02, 0.05)),
        key=fmean,
    )
    federated = accuracy(clients=50, cohort=10, rounds=100, epochs=2, lr=0.05)
    for name, values in (("central, 20 epochs", central), ("FedAvg, 50 clients, 10 a round, 100 rounds", federated)):
        print(f"{name:44} {100 * fmean(values):.1f} % ± {100 * stdev(values):.1f}")
    print(f"{'difference':44} {100 * (fmean(central) - fmean(federated)):+.1f} points")


if __name__ == "__main__":
    main()
