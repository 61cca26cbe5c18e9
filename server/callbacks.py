"""What happens in a run, told to whoever wants to know.

The run folder and the display are callbacks like a user's own. What one must know after a restart it remembers through
the checkpoint, so a run that is resumed goes on to the same bits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from shoal.protos.errors import ExperimentError
from shoal.protos.experiment import lower_is_better

if TYPE_CHECKING:
    from shoal.protos.messages import Failure
    from shoal.server.checkpoints import Checkpoint
    from shoal.server.coordinator import Plan
    from shoal.server.fleet import Report, Round

__all__ = ["BestModel", "Callback", "EarlyStopping", "Snapshots", "Start", "Stop"]

EVERY = 2**31  # checkpoints, none of which is dropped


@dataclass(frozen=True)
class Start:
    """What a run begins with, or goes on with: then ``point`` is its last checkpoint; and its folder, if any."""

    plan: Plan
    point: Checkpoint
    path: Path | None


@dataclass(frozen=True)
class Stop:
    """Returned by :meth:`Callback.on_round_end`: the run ends here, as a finished one."""

    reason: str


class Callback:
    """Told of everything that happens; override what is of interest. What a method raises ends the run.

    An experiment's callbacks are copied for each run, so they may keep what they like; what must survive a restart goes
    through :meth:`remember` and :meth:`recall`.
    """

    def on_run_start(self, start: Start) -> None:
        """Before anything else, also of a run that goes on."""

    def on_round_start(self, number: int, cohort: Sequence[str]) -> None:
        """Before the clients of a round are asked."""

    def on_failure(self, failure: Failure) -> None:
        """As soon as a client fails."""

    def on_answers(self, round: int, answered: int, asked: int) -> None:
        """While a round goes on: how many of its clients have answered or failed."""

    def on_evaluations(self, round: int, reports: Sequence[Report]) -> None:
        """While clients are evaluated, before the round's own call: the next of them, in the population's order."""

    def on_round_end(self, round: Round, point: Checkpoint) -> Stop | None:
        """After each round, with the value that it made, and once as round 0 for the evaluation of the first model."""
        return None

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """When the state is to be kept."""

    def on_run_end(self, point: Checkpoint) -> None:
        """After the last round or an interrupt, when the state has been kept."""

    def on_exception(self, error: BaseException) -> None:
        """When a run fails or a round is abandoned, before the error goes on its way."""

    def remember(self) -> Mapping[str, Any]:
        """What :meth:`recall` needs after a restart, in JSON's types; asked for each checkpoint."""
        return {}

    def recall(self, kept: Mapping[str, Any]) -> None:
        """What :meth:`remember` gave for the checkpoint from which the run goes on."""


class _Watch:
    """The best value of a metric so far, and for how many evaluations there was no better one."""

    def __init__(self, metric: str, least: float = 0.0) -> None:
        self._metric, self._least = metric, least
        self.best: float | None = None
        self.waited = 0

    def sees(self, round: Round) -> bool:
        """Whether this round has a new best value. One that is not finite is no better than any."""
        value = round.numbers.get(self._metric)
        if value is None:
            return False
        better = math.isfinite(value) and (self.best is None or self._gain(value, self.best) > self._least)
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        return better

    def _gain(self, value: float, best: float) -> float:
        return best - value if lower_is_better(self._metric) else value - best


@dataclass
class EarlyStopping(Callback):
    """Ends the run when ``metric`` was not more than ``least`` better than its best for ``patience`` evaluations.

    To stop by the test set is to choose by it: take a metric of data that you don't report, such as ``clients_loss``.
    """

    metric: str
    patience: Annotated[int, Ge(1)] = 10
    least: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        self._watch = _Watch(self.metric, self.least)

    def on_round_end(self, round: Round, point: Checkpoint) -> Stop | None:
        if self._watch.sees(round) or self._watch.waited < self.patience:
            return None
        return Stop(f"{self.metric} has not improved for {self.patience} evaluations")

    def remember(self) -> Mapping[str, Any]:
        return {"best": self._watch.best, "waited": self._watch.waited}

    def recall(self, kept: Mapping[str, Any]) -> None:
        self._watch.best, self._watch.waited = kept["best"], kept["waited"]


@dataclass
class BestModel(Callback):
    """Keeps the model of the round with the best ``metric`` in the run's ``best/``; :attr:`shoal.Run.best` reads it.

    What was best before the last checkpoint stays until the next one: the run may have to go on from there.
    """

    metric: str

    def __post_init__(self) -> None:
        self._watch = _Watch(self.metric)
        self._folder: Path | None = None

    def on_run_start(self, start: Start) -> None:
        self._folder = _folder(start, "best")
        for path in self._folder.glob("round-*"):
            if int(path.name.removeprefix("round-")) > start.point.round:
                shutil.rmtree(path)  # of rounds that are to be run again

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        if self._watch.sees(round) and self._folder is not None:
            from shoal.server import checkpoints  # PyTorch

            checkpoints.write(self._folder, point, keep=EVERY)

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        if self._folder is not None:
            from shoal.server import checkpoints

            checkpoints.prune(self._folder, keep=1)

    def remember(self) -> Mapping[str, Any]:
        return {"best": self._watch.best}

    def recall(self, kept: Mapping[str, Any]) -> None:
        self._watch.best = kept["best"]


@dataclass
class Snapshots(Callback):
    """Keeps the state of every nth round in the run's ``snapshots/``, where none replaces another."""

    every: Annotated[int, Ge(1)] = 10

    def __post_init__(self) -> None:
        self._folder: Path | None = None

    def on_run_start(self, start: Start) -> None:
        self._folder = _folder(start, "snapshots")

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        if self._folder is not None and round.number and round.number % self.every == 0:
            from shoal.server import checkpoints

            checkpoints.write(self._folder, point, keep=EVERY)


def _folder(start: Start, name: str) -> Path:
    if start.path is None:
        raise ExperimentError(f"there is no run folder in which {name!r} could be kept")
    return start.path / name
