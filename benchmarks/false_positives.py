"""Does ``shoal compare`` keep its word? FedAvg against itself, and against itself with a difference that is planted.

Each of 200 comparisons has two arms of FedAvg on seeds of their own, so nothing but chance differs: the share of them
that the test calls significant must not exceed its nominal rate. Then a constant is added to one arm's results; the
share that finds it is set beside the power of the t-test (noncentral t), to which the sign-flip test is asymptotically
equivalent. The runs are real ones, tiny, over the lean engine; the rows are those of a comparison.

    python -m benchmarks.false_positives [--comparisons 200] [--seeds 8] [--first 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch
from scipy import stats

from shoal import Experiment, LocalTraining, datasets
from shoal.compose import Composition, Place
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Round
from shoal.simulations.comparison import rows
from shoal.simulations.fleet import LEAN
from shoal.simulations.statistics import ALPHA, smallest_p
from shoal.versions import versions

METRICS = ("test_loss", "test_accuracy")
RESULTS = Path(__file__).parent / "results" / "false_positives.json"


def experiment() -> Experiment:
    """Twelve clients, three classes that overlap, a linear model, three rounds: a few hundredths of a second."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 360)
    x = (rng.normal(size=(360, 5)) + np.eye(3, 5)[y]).astype("float32")
    clients = [f"c{i % 12}" for i in range(240)]
    data = datasets.from_arrays(x[:240], y[:240], clients=clients, test=(x[240:], y[240:]))
    return Experiment(model="linear", data=data, local=LocalTraining(lr=0.1, batch_size=5), rounds=3, cohort=4)


class Last(Callback):
    """Keeps the last round's metrics."""

    numbers: Mapping[str, float]

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self.numbers = round.numbers


def measure(made: Experiment, seed: int) -> dict[str, float]:
    """One whole run, without a folder."""
    composition, last = Composition(replace(made, seed=seed)), Last()
    with closing(composition.simulated(Place(0), LEAN)) as fleet:
        composition.coordinator(fleet, composition.start(), [last]).run()
    return {name: last.numbers[name] for name in METRICS}


def p_of(first: Sequence[float], second: Sequence[float], metric: str) -> float:
    """That of the table's row for the second arm."""
    spent = {"bytes_up": 0, "bytes_down": 0, "seconds": 0, "failed": 0, "rounds": 3, "best": {}, "mean_of_last_10": {}}
    runs = {("", arm, seed): spent | {"last": {metric: value}}
            for arm, values in (("a", first), ("b", second)) for seed, value in enumerate(values)}  # fmt: skip
    p = rows([""], ["a", "b"], range(len(first)), runs, metric, {})[1].p_holm
    assert p is not None
    return p


def level(pairs: int) -> float:
    """The largest p at or below 5 % that the test can give: its true rate of false positives."""
    return int(ALPHA / smallest_p(pairs)) * smallest_p(pairs)


def power(effect: float, pairs: int) -> float:
    """Of the two-sided t-test at the sign-flip test's level; ``effect`` in standard deviations of the differences."""
    limit, centre = stats.t.ppf(1 - level(pairs) / 2, pairs - 1), effect * pairs**0.5
    return float(stats.nct.sf(limit, pairs - 1, centre) + stats.nct.cdf(-limit, pairs - 1, centre))


def summary(values: np.ndarray, metric: str, effects: Sequence[float]) -> dict[str, Any]:
    """How often something is found in ``values`` ``[comparisons, 2, seeds]``, and how often it should be."""
    comparisons, _, pairs = values.shape
    spread = stdev((values[:, 1] - values[:, 0]).ravel().tolist())
    found = {}
    for effect in [0.0, *effects]:
        hits = sum(p_of(a.tolist(), (b + effect * spread).tolist(), metric) <= ALPHA for a, b in values)
        interval = stats.binomtest(hits, comparisons).proportion_ci(0.95)
        expected = power(effect, pairs) if effect else level(pairs)
        found[f"{effect:g}"] = {"found": hits, "low": interval.low, "high": interval.high, "expected": expected}
    return {"metric": metric, "sd_of_differences": spread, "effects": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="the first seed: others give an experiment of its own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # these runs are too small to share
    made, count = experiment(), asked.comparisons * 2 * asked.seeds
    runs = [measure(made, seed) for seed in range(asked.first, asked.first + count)]
    shape = (asked.comparisons, 2, asked.seeds)
    found = [summary(np.array([r[m] for r in runs]).reshape(shape), m, (0.8, 1.2, 1.6)) for m in METRICS]
    said = {
        "comparisons": asked.comparisons,
        "seeds": asked.seeds,
        "runs": count,
        "versions": versions(),
        "found": found,
    }
    asked.out.write_text(json.dumps(said, indent=2) + "\n")
    print(json.dumps(said, indent=2))


if __name__ == "__main__":
    main()
