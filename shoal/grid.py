"""The grid of a comparison: scenarios by arms by seeds, all of it checked before anything is run or written."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, cast

import tomli_w

from shoal import arms
from shoal.arms import Arm
from shoal.client.process import cores
from shoal.compose import Composition
from shoal.experiment import UNNAMED, Experiment
from shoal.keys import data_key, run_key
from shoal.progress import on_shards, on_training
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Segment
from shoal.simulations.blocks import EngineName, Method
from shoal.simulations.datasets import Dataset
from shoal.strategies.base import Strategy

__all__ = ["Cell", "Grid", "lay_out", "read", "scenarios_of", "varied"]

FIXED = ("strategy", "seed", "name", "target", "checkpoint_every")  # what cannot be varied
Vary = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a scenario and arm: ``changes`` as on the command line, after so many ``trials``.

    ``score`` is the main metric on the rows held back, negative where lower is better.
    """

    scenario: str
    arm: str
    changes: Sequence[str]
    trials: int
    score: float
    searched: str


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm in one scenario under one seed; ``key`` says what determines its result."""

    scenario: str
    arm: str
    seed: int
    experiment: Experiment
    key: str

    @property
    def name(self) -> str:
        return ", ".join([self.arm, *([self.scenario] if self.scenario else []), f"seed {self.seed}"])


@dataclass(frozen=True)
class Grid:
    """Cells seed by seed, so that what an interrupt leaves is pairs; ``setup`` says in words what they share."""

    experiment: Experiment
    arms: Mapping[str, Arm]
    vary: Vary
    scenarios: Sequence[str]
    seeds: Sequence[int]
    cells: Sequence[Cell]
    engine: str
    workers: int
    setup: Mapping[str, str]
    tuned: Sequence[Tuned] = ()
    extra: Sequence[str] = ()  # words of the command that say how it was tuned

    @property
    def target(self) -> Mapping[str, float]:
        return self.experiment.target

    @cached_property
    def key(self) -> str:
        """Two grids of one key are one comparison."""
        facts = [[cell.scenario, cell.arm, cell.seed, cell.key] for cell in self.cells]
        return hashlib.sha256(json.dumps([self.experiment.name, dict(self.target), facts]).encode()).hexdigest()[:16]

    def with_choices(self, tuned: Sequence[Tuned], extra: Sequence[str]) -> Grid:
        """The grid with what was chosen for each scenario and arm."""
        changes = {(one.scenario, one.arm): one.changes for one in tuned}
        scenarios = scenarios_of(self.experiment, self.vary)
        cells = _cells(scenarios, self.arms, self.seeds, self.engine, changes)
        return replace(self, cells=cells, tuned=tuned, extra=extra)

    def toml(self, path: Path) -> str:
        """What is compared, beside the experiment of the folder ``path``."""
        described = [self._described(label, arm) for label, arm in self.arms.items()]
        command = self._command(path)
        comparison = {
            "key": self.key,
            "seeds": list(self.seeds),
            "scenarios": list(self.scenarios),
            "engine": self.engine,
            "target": dict(self.target),
            "setup": dict(self.setup),
            "arms": described,
            "tuning": [{**asdict(one), "changes": list(one.changes)} for one in self.tuned],
            **({"command": command} if command else {}),
        }
        return tomli_w.dumps({"comparison": comparison})

    @staticmethod
    def _described(label: str, arm: Arm) -> dict[str, Any]:
        given = {key: value for key, value in arms.arguments(arm.strategy).items() if key not in arm.open}
        said = [f"{key} = {value}" for key, value in given.items()] + [f"{key} tuned" for key in arm.open]
        return {"label": label, "citation": arm.strategy.citation, "arguments": ", ".join(said)}

    def _command(self, path: Path) -> str | None:
        """The command that repeats this comparison; None if there is none."""
        written = [arms.written(arm) for arm in self.arms.values()]
        if None in written or self.experiment.toml().startswith(UNNAMED):
            return None
        vary = [f"{key}={'|'.join(map(arms.as_toml, values))}" for key, values in self.vary.items()]
        words = ["shoal", "compare", str(path / "experiment.toml"), "--strategies", ",".join(map(str, written))]
        words += [word for text in vary for word in ("--vary", text)]
        return shlex.join([*words, "--seeds", str(len(self.seeds)), "--engine", self.engine, *self.extra])


def read(path: Path, overrides: Sequence[str], target: str | None) -> Experiment:
    """The experiment file with what the command line changes; ``target`` (``"accuracy=0.8"``) replaces the file's."""
    for override in overrides:
        if re.match(r"strategy\b", override):
            raise ExperimentError(f"override {override!r}: strategies are compared; name them with --strategies")
    if target is not None and not re.fullmatch(r"\s*\w+\s*=\s*\S+\s*", target):
        raise ExperimentError(f"--target {target!r} is not of the form metric=value, for example accuracy=0.8")
    return Experiment.from_file(path, [*overrides, *([] if target is None else [f"target={{{target}}}"])])


def varied(texts: Sequence[str], option: str = "--vary") -> dict[str, list[str]]:
    """What ``--vary`` and its like say: ``data.partition.alpha=0.1|1.0`` is a key and the values that it takes."""
    found = dict[str, list[str]]()
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not all(pieces := arms.split(values, "|")):
            raise ExperimentError(
                f"{option} {text!r} is not of the form key=value|value, as data.partition.alpha=0.1|1.0"
            )
        if key.strip() in found:
            raise ExperimentError(f"{option} names {key.strip()!r} twice; give all its values at once")
        found[key.strip()] = pieces
    return found


def lay_out(
    experiment: Experiment,
    strategies: Sequence[Strategy | str],
    seeds: int,
    target: Mapping[str, float] | None = None,
    workers: int | None = None,
    vary: Vary | None = None,
    engine: str = "lean",
    tuned: bool = False,
) -> Grid:
    """Check everything that can be checked, and say what is wrong in one sentence.

    With ``tuned``, arguments with alternatives are left open; :meth:`Grid.with_choices` then closes them.
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ExperimentError(f"seeds is {seeds!r}; it must be a number of seeds, 1 or more")
    if workers is not None and workers < 1:
        raise ExperimentError(f"workers is {workers}; a comparison needs 1 worker process or more")
    if Method.read(engine) is None:
        raise ExperimentError(f"engine {engine!r} has no block size, which all cells must share; write '{engine}:16'")
    named = arms.read(strategies, tuned)
    base = experiment if target is None else replace(experiment, target=target)
    base = replace(base, strategy=next(iter(named.values())).strategy)
    scenarios, numbers = scenarios_of(base, vary or {}), range(base.seed, base.seed + seeds)
    setup = _setup(scenarios, numbers, engine, [arm.strategy for arm in named.values()])
    cells = _cells(scenarios, named, numbers, engine)
    most = cores() if base.device == "cpu" else 1
    return Grid(base, named, vary or {}, list(scenarios), numbers, cells, engine, workers or most, setup)


def scenarios_of(base: Experiment, vary: Vary) -> dict[str, Experiment]:
    """The experiment of each combination of values, by what tells them apart; one without a name if none is varied."""
    for key, values in vary.items():
        if key.partition(".")[0] in FIXED:
            raise ExperimentError(f"{key!r} cannot be varied; strategies and seeds have --strategies and --seeds")
        if isinstance(values, str) or len(values) == 0:
            raise ExperimentError(f"{key!r} varies over {values!r}; give a list of values")
    last = [key.rpartition(".")[2] for key in vary]
    short = {key: end if last.count(end) == 1 else key for key, end in zip(vary, last, strict=True)}
    found = dict[str, Experiment]()
    for chosen in product(*([(key, arms.as_toml(value)) for value in values] for key, values in vary.items())):
        name = " ".join(f"{short[key]}={text}" for key, text in chosen)
        if name in found:
            raise ExperimentError(f"the scenario {name!r} is given twice; give each value once")
        found[name] = base.changed([f"{key}={text}" for key, text in chosen])
    return found


def _cells(
    scenarios: Mapping[str, Experiment],
    named: Mapping[str, Arm],
    seeds: Sequence[int],
    engine: str,
    changes: Mapping[tuple[str, str], Sequence[str]] | None = None,
) -> list[Cell]:
    data = {scenario: data_key(made.data) for scenario, made in scenarios.items()}
    cells = []
    for seed, (scenario, made), (label, arm) in product(seeds, scenarios.items(), named.items()):
        # Names and targets make no run another one.
        experiment = replace(made, strategy=arm.strategy, seed=seed, name="cell", target={})
        experiment = experiment.changed((changes or {}).get((scenario, label), ()))
        cells.append(Cell(scenario, label, seed, experiment, run_key(experiment, data[scenario], engine)))
    return cells


def _setup(
    scenarios: Mapping[str, Experiment], seeds: Sequence[int], engine: str, strategies: Sequence[Strategy]
) -> dict[str, str]:
    """Each seed's data and model, made once to see that they can be; then in words."""
    words = dict[str, str]()
    for scenario, experiment in scenarios.items():
        aside, population = f", {scenario}" if scenario else "", 0
        words[f"data{aside}"] = _on_data(experiment.data)
        for seed in seeds:
            composition = Composition(replace(experiment, seed=seed))
            composition.check_simulation()
            if composition.data is None or composition.data.test is None or not experiment.evaluation.every:
                raise ExperimentError(
                    "there is nothing to compare by; set data.test_fraction = 0.2, and evaluation.every above 0"
                )
            population = len(composition.data.clients)
            if composition.shards:
                words[f"shards{aside}, seed {seed}"] = on_shards(composition.shards)
        words[f"clients{aside}"] = f"{population}, {experiment.cohort} a round"
        words[f"rounds{aside}"] = str(experiment.rounds)
        trainable = composition.initial.layout.size(Segment.TRAINABLE)
        words[f"model{aside}"] = on_training(experiment, trainable)
        for strategy in strategies if engine != "lean" else ():
            name = cast(EngineName, engine.partition(":")[0])
            Composition(replace(experiment, strategy=strategy)).check_engine(name)
    return words


def _on_data(data: object) -> str:
    if not isinstance(data, Dataset) or data.spec is None:
        return repr(data).strip("<>")
    spec = dict(data.spec)
    name, partition = spec.pop("name"), dict(spec.pop("partition", {}))
    words = [str(name), *(f"{key} {value}" for key, value in spec.items())]
    if partition:
        kind = partition.pop("kind")
        words.append(f"split {kind} ({', '.join(f'{key} {value}' for key, value in partition.items())})")
    return " · ".join(words)
