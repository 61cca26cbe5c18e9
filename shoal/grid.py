"""The grid of a comparison: arms by seeds, all of it checked before anything is run or written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from shoal import arms
from shoal.cell import ENGINE
from shoal.client.process import cores
from shoal.compose import Composition
from shoal.experiment import UNNAMED, Experiment
from shoal.progress import on_shards, on_training
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Segment
from shoal.simulations.datasets import Dataset
from shoal.strategies.base import Strategy

__all__ = ["Cell", "Grid", "lay_out", "read"]


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm under one seed."""

    arm: str
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Where its run is kept, below the comparison's folder."""
        slug = re.sub(r"[^\w.=-]+", "-", self.arm).strip("-.")[:100]
        return f"cells/{slug}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """Cells seed by seed, so that what an interrupt leaves is pairs; ``setup`` says in words what they share."""

    experiment: Experiment
    arms: Mapping[str, Strategy]
    seeds: Sequence[int]
    cells: Sequence[Cell]
    workers: int
    setup: Mapping[str, str]

    @property
    def target(self) -> Mapping[str, float]:
        return self.experiment.target

    def toml(self, path: Path) -> str:
        """What is compared, beside the experiment of the folder ``path``."""
        described = [self._described(label, strategy) for label, strategy in self.arms.items()]
        command = self._command(path)
        comparison = {
            "seeds": list(self.seeds),
            "engine": ENGINE,
            "target": dict(self.target),
            "setup": dict(self.setup),
            "arms": described,
            **({"command": command} if command else {}),
        }
        return tomli_w.dumps({"comparison": comparison})

    @staticmethod
    def _described(label: str, strategy: Strategy) -> dict[str, Any]:
        return {
            "label": label,
            "citation": strategy.citation,
            "arguments": ", ".join(f"{key} = {value}" for key, value in arms.arguments(strategy).items()),
        }

    def _command(self, path: Path) -> str | None:
        """The command that repeats this comparison; None if there is none."""
        written = [arms.written(strategy) for strategy in self.arms.values()]
        if None in written or self.experiment.toml().startswith(UNNAMED):
            return None
        words = ["shoal", "compare", str(path / "experiment.toml"), "--strategies", ",".join(map(str, written))]
        return shlex.join([*words, "--seeds", str(len(self.seeds))])


def read(path: Path, overrides: Sequence[str], target: str | None) -> Experiment:
    """The experiment file with what the command line changes; ``target`` (``"accuracy=0.8"``) replaces the file's."""
    for override in overrides:
        if re.match(r"strategy\b", override):
            raise ExperimentError(f"override {override!r}: strategies are compared; name them with --strategies")
    if target is not None and not re.fullmatch(r"\s*\w+\s*=\s*\S+\s*", target):
        raise ExperimentError(f"--target {target!r} is not of the form metric=value, for example accuracy=0.8")
    return Experiment.from_file(path, [*overrides, *([] if target is None else [f"target={{{target}}}"])])


def lay_out(
    experiment: Experiment,
    strategies: Sequence[Strategy | str],
    seeds: int,
    target: Mapping[str, float] | None,
    workers: int | None,
) -> Grid:
    """Check everything that can be checked, and say what is wrong in one sentence."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ExperimentError(f"seeds is {seeds!r}; it must be a number of seeds, 1 or more")
    if workers is not None and workers < 1:
        raise ExperimentError(f"workers is {workers}; a comparison needs 1 worker process or more")
    named = arms.labelled([arms.parse(s) if isinstance(s, str) else s for s in strategies])
    base = experiment if target is None else replace(experiment, target=target)
    base = replace(base, strategy=next(iter(named.values())))
    numbers = range(base.seed, base.seed + seeds)
    cells = [
        Cell(label, seed, replace(base, strategy=strategy, seed=seed))
        for seed in numbers
        for label, strategy in named.items()
    ]
    most = cores() if base.device == "cpu" else 1
    return Grid(base, named, numbers, cells, min(workers or most, len(cells)), _setup(base, numbers))


def _setup(experiment: Experiment, seeds: Sequence[int]) -> dict[str, str]:
    """Each seed's data and model, made once to see that they can be; then in words."""
    shards, population = {}, 0
    for seed in seeds:
        composition = Composition(replace(experiment, seed=seed))
        composition.check_simulation()
        if composition.data is None or composition.data.test is None or not experiment.evaluation.every:
            raise ExperimentError(
                "there is nothing to compare by; set data.test_fraction = 0.2, and evaluation.every above 0"
            )
        population = len(composition.data.clients)
        if composition.shards:
            shards[f"shards, seed {seed}"] = on_shards(composition.shards)
    return {
        "data": _on_data(experiment.data),
        **shards,
        "clients": f"{population}, {experiment.cohort} a round",
        "rounds": str(experiment.rounds),
        "model": on_training(experiment, composition.initial.layout.size(Segment.TRAINABLE)),
    }


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
