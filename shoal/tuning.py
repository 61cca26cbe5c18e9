"""Tuning before a comparison: each arm gets the same number of trials, judged by rows held back for that alone.

A trial is a run like a cell's, kept in the same place by the same kind of key, under a seed of its own. Its test set is
a share of the training rows; the real test set is not looked at. The best last evaluation wins.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from shoal.arms import Arm, bounds
from shoal.experiment import Experiment
from shoal.grid import Cell, Grid, Tuned, scenarios_of
from shoal.keys import data_key, run_key
from shoal.making import make
from shoal.protos.errors import ExperimentError, nearest
from shoal.protos.experiment import lower_is_better
from shoal.protos.seeds import integer, stream
from shoal.record import finished, summary_of
from shoal.simulations.comparison import main_metric
from shoal.simulations.datasets import Dataset
from shoal.tally import Tally

__all__ = ["Search", "tune"]

SHARE = 0.2  # of the training rows, held back to choose by
BATCH = 4  # of optuna's trials at once: its choices must not depend on how many workers there are


@dataclass(frozen=True)
class Search:
    """``trials`` an arm over its own alternatives and those of ``space``, chosen by ``sampler``."""

    trials: int
    space: Mapping[str, Sequence[str]]
    sampler: str = "random"

    def __post_init__(self) -> None:
        known = ("random", "optuna")
        if isinstance(self.trials, bool) or self.trials < 1:
            raise ExperimentError(f"tune is {self.trials!r}; it must be a number of trials, 1 or more")
        if self.sampler not in known:
            raise ExperimentError(f"there is no sampler {self.sampler!r}{nearest(self.sampler, known)}")
        if self.sampler == "optuna" and find_spec("optuna") is None:
            raise ExperimentError("the sampler 'optuna' is not installed; pip install 'shoal[tune]'")

    @property
    def words(self) -> list[str]:
        """As on the command line."""
        common = [word for key, values in self.space.items() for word in ("--search", f"{key}={'|'.join(values)}")]
        return ["--tune", str(self.trials), *common, "--sampler", self.sampler]

    def of(self, label: str, arm: Arm) -> dict[str, Sequence[str]]:
        """What is searched for an arm, by dotted key."""
        space = {**self.space, **{f"strategy.{key}": values for key, values in arm.open.items()}}
        if not space:
            raise ExperimentError(
                f"there is nothing to tune for {label!r}; give it alternatives (mu=0.01|0.1), or all arms a --search"
            )
        return space


def tune(grid: Grid, search: Search, store: Path, show: Tally) -> list[Tuned]:
    """The best found for each scenario and arm; ExperimentError if all trials of one failed."""
    seed, arms, scenarios = integer(grid.experiment.seed, "tuning") % 2**31, grid.arms, grid.scenarios
    made = scenarios_of(grid.experiment, grid.vary)
    fields = {name: _Field(validating(experiment, seed), grid.engine) for name, experiment in made.items()}
    samplers = {
        (scenario, label): _sampler(search, search.of(label, arm), seed, f"{scenario}/{label}")
        for scenario in scenarios
        for label, arm in arms.items()
    }
    found = {place: list[tuple[Sequence[str], float]]() for place in samplers}
    while asked := {place: batch for place, sampler in samplers.items() if (batch := sampler.ask())}:
        cells = {
            (place, number): fields[place[0]].cell(place[0], place[1], arms[place[1]], changes)
            for place, batch in asked.items()
            for number, changes in enumerate(batch)
        }
        scores = _scores(list(cells.values()), grid, store, show)
        for (place, number), cell in cells.items():
            changes, score = asked[place][number], scores[cell.key]
            samplers[place].tell(changes, score)
            found[place].append((changes, score))
            show.tried(f"{', '.join(filter(None, place))}: {' '.join(changes)}", score)
    return [_best(place, tried, search.of(place[1], arms[place[1]])) for place, tried in found.items()]


def _best(place: tuple[str, str], tried: Sequence[tuple[Sequence[str], float]], space: Mapping[str, Any]) -> Tuned:
    changes, score = max(tried, key=lambda one: one[1])
    if score == -math.inf:
        raise ExperimentError(f"all {len(tried)} trials of {', '.join(filter(None, place))} failed; see above why")
    searched = ", ".join(f"{key} of {'|'.join(values)}" for key, values in space.items())
    return Tuned(*place, changes, len(tried), score, searched)


def validating(experiment: Experiment, seed: int) -> Experiment:
    """The experiment with a share of its training rows, the same under every seed, in place of its test set."""
    data = experiment.data
    if not isinstance(data, Dataset):
        raise ExperimentError("tuning holds rows back; give the data as rows, shoal.datasets.from_arrays and its like")
    rows = stream(0, "validation").permutation(len(data.train))
    held = round(SHARE * len(rows))
    kept, aside = (data.train.take(np.sort(part)) for part in (rows[held:], rows[:held]))
    return replace(experiment, data=replace(data, train=kept, test=aside, spec=None), seed=seed, name="cell", target={})


class _Field:
    """Where trials of a scenario are made."""

    def __init__(self, experiment: Experiment, engine: str) -> None:
        self._experiment, self._data, self._engine = experiment, data_key(experiment.data), engine

    def cell(self, scenario: str, label: str, arm: Arm, changes: Sequence[str]) -> Cell:
        made = replace(self._experiment, strategy=arm.strategy).changed(changes)
        return Cell(scenario, f"{label} {' '.join(changes)}", made.seed, made, run_key(made, self._data, self._engine))


def _scores(cells: Sequence[Cell], grid: Grid, store: Path, show: Tally) -> dict[str, float]:
    """The main metric on the rows held back, by key; the higher the better, -inf for a run that failed."""
    missing = {cell.key: cell for cell in cells if not finished(store / cell.key)}
    with closing(make(list(missing.values()), store, grid.engine, grid.workers, show)) as results:
        for cell, ended in results:
            if ended.reason:
                show.note(f"{cell.name}: the trial failed: {ended.reason}")
    summaries = {cell.key: summary_of(store / cell.key, {}) for cell in cells if finished(store / cell.key)}
    metric = main_metric(summaries.values(), grid.target)
    last = {key: summary["last"].get(metric) for key, summary in summaries.items()}
    sign = -1 if lower_is_better(metric) else 1
    return {c.key: -math.inf if (value := last.get(c.key)) is None else sign * value for c in cells}


# --- samplers --------------------------------------------------------------------------------------------------------


class Sampler(ABC):
    """Which settings of an arm to try."""

    @abstractmethod
    def ask(self) -> list[list[str]]:
        """The next ones to try, as changes; none when the budget is spent."""

    @abstractmethod
    def tell(self, changes: Sequence[str], score: float) -> None:
        """How good one of them was."""


def _sampler(search: Search, space: Mapping[str, Sequence[str]], seed: int, name: str) -> Sampler:
    return (Random if search.sampler == "random" else Optuna)(search.trials, space, seed, name)


class Random(Sampler):
    """The whole grid where the budget covers it; else draws, without repetition where there are no ranges."""

    def __init__(self, trials: int, space: Mapping[str, Sequence[str]], seed: int, name: str) -> None:
        rng = stream(seed, "trials", client=name)
        if any(bounds(values) for values in space.values()):
            self._left = [[f"{key}={_draw(values, rng)}" for key, values in space.items()] for _ in range(trials)]
            return
        grid = [list(chosen) for chosen in product(*([f"{key}={v}" for v in values] for key, values in space.items()))]
        chosen = range(len(grid)) if len(grid) <= trials else np.sort(rng.permutation(len(grid))[:trials]).tolist()
        self._left = [grid[place] for place in chosen]

    def ask(self) -> list[list[str]]:
        asked, self._left = self._left, []
        return asked

    def tell(self, changes: Sequence[str], score: float) -> None:
        return


def _draw(values: Sequence[str], rng: np.random.Generator) -> str:
    """One of the alternatives; of a range, log-uniform."""
    ends = bounds(values)
    if ends is None:
        return values[int(rng.integers(len(values)))]
    return f"{math.exp(rng.uniform(math.log(ends[0]), math.log(ends[1]))):.3g}"


class Optuna(Sampler):
    """The tree-structured Parzen estimator of optuna."""

    def __init__(self, trials: int, space: Mapping[str, Sequence[str]], seed: int, name: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=integer(seed, "trials", client=name) % 2**32)
        self._study, self._space, self._budget = (
            optuna.create_study(direction="maximize", sampler=sampler),
            space,
            trials,
        )
        self._asked: dict[tuple[str, ...], list[Any]] = {}

    def ask(self) -> list[list[str]]:
        count = min(BATCH, self._budget)
        self._budget -= count
        return [self._suggested() for _ in range(count)]

    def _suggested(self) -> list[str]:
        trial, changes = self._study.ask(), []
        for key, values in self._space.items():
            ends = bounds(values)
            value = (
                trial.suggest_categorical(key, list(values))
                if ends is None
                else trial.suggest_float(key, *ends, log=True)
            )
            changes.append(f"{key}={value if isinstance(value, str) else format(value, '.3g')}")
        self._asked.setdefault(tuple(changes), []).append(trial)
        return changes

    def tell(self, changes: Sequence[str], score: float) -> None:
        from optuna.trial import TrialState

        trial = self._asked[tuple(changes)].pop(0)
        if score == -math.inf:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, score)
