"""What a user sees while a run goes on: a live line on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shoal.protos.errors import ExperimentError, nearest
from shoal.protos.messages import Failure
from shoal.server.callbacks import Callback
from shoal.server.fleet import Round
from shoal.server.runs import plain

if TYPE_CHECKING:
    from shoal.experiment import Experiment
    from shoal.run import Run
    from shoal.server.checkpoints import Checkpoint

__all__ = ["Display", "Opening", "Output", "display", "on_shards", "on_training"]


class Output(Console):
    """Whoever reads may stop reading (``| head``): the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Opening:
    """What there is to say before the first round, or the first after ``round``.

    ``heading`` are the lines for people. ``rounds`` is 0 where nobody knows yet how many there will be. ``shards``
    describes how the data lies, if that is known.
    """

    path: Path
    heading: Sequence[str]
    rounds: int
    population: int
    engine: str
    shards: Mapping[str, float] = field(default_factory=dict)
    round: int = 0

    @classmethod
    def of(
        cls,
        path: Path,
        experiment: Experiment,
        population: int,
        parameters: int,
        engine: str,
        shards: Mapping[str, float],
        round: int = 0,
    ) -> Opening:
        """That of an experiment, whose model has so many ``parameters``."""
        e = experiment
        clients = f"{population} clients, {e.cohort} a round · {e.rounds} rounds · seed {e.seed}"
        heading = [
            f"  {type(e.strategy).__name__} · {clients}",
            *([f"  {on_shards(shards)}"] if shards else []),
            f"  {on_training(e, parameters)}",
        ]
        return cls(path, heading, e.rounds, population, engine, shards, round)


class Display(Callback, ABC):
    """A callback that shows a run to someone."""

    _shown: frozenset[int] = frozenset({hash("")})  # tracebacks may be long and many
    for_programs = False  # standard output is for programs: nobody else may print there

    @abstractmethod
    def starting(self, opening: Opening) -> None: ...

    @abstractmethod
    def on_round_end(self, round: Round, point: Checkpoint) -> None: ...

    def on_failure(self, failure: Failure) -> None:
        """Failures come at once: nothing is silent. A traceback that was shown before is not repeated."""
        who = "" if repr(failure.client) in failure.reason else f"client {failure.client!r}: "
        text = f"round {failure.round}: {who}{failure.reason}"
        known, self._shown = self._shown, self._shown | {hash(failure.traceback)}
        self.note(text if hash(failure.traceback) in known else f"{text}\n{failure.traceback}")

    def on_run_end(self, point: Checkpoint) -> None:
        if point.stopped:
            self.note(f"stopped after round {point.round}: {point.stopped}")

    def expecting(self, rounds: int) -> None:
        """How many rounds there will be, where the opening did not know."""
        return

    def planned(self, line: str) -> None:
        """How clients will be played, found by measuring."""
        self.note(line)

    def waiting(self, present: int, needed: int) -> None:
        """A server waits for its clients."""
        self.note(f"waiting for clients: {present} of {needed} are connected")

    @abstractmethod
    def note(self, text: str) -> None: ...

    @abstractmethod
    def finished(self, run: Run) -> None: ...

    def close(self) -> None:
        return


def display(mode: str) -> Display:
    """``"auto"`` (live on a terminal, else plain), ``"plain"``, ``"json"`` or ``"none"``."""
    modes: dict[str, Callable[[], Display]] = {"live": Live, "plain": Plain, "json": Json, "none": Silent}
    if mode == "auto":
        mode = "live" if Console(stderr=False).is_terminal else "plain"
    if mode not in modes:
        raise ExperimentError(f"there is no progress {mode!r}{nearest(mode, [*modes, 'auto'])}")
    return modes[mode]()


class Plain(Display):
    """One line a round."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Output(highlight=False, soft_wrap=True)
        self._rounds = 0

    def starting(self, opening: Opening) -> None:
        self._rounds = opening.rounds
        for line in (f"shoal · {opening.path}", *opening.heading, f"  engine {opening.engine}"):
            self.console.print(line, markup=False)

    def expecting(self, rounds: int) -> None:
        self._rounds = rounds

    def planned(self, line: str) -> None:
        self.console.print(f"  measured  {line}", markup=False)

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self.console.print(_line(round, self._rounds), markup=False)

    def note(self, text: str) -> None:
        self.console.print(f"! {text}", markup=False)

    def finished(self, run: Run) -> None:
        _print_summary(self.console, run)


class Live(Plain):
    """A bar with the time left and the last numbers, above it what went wrong."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._history: list[float] = []
        self._bar = Progress(
            TextColumn("round {task.fields[at]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[answers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=2,  # drawing a line takes 3 ms, of a core that could train
        )

    def starting(self, opening: Opening) -> None:
        super().starting(opening)
        at, total = self._at(opening.round), opening.rounds or None
        self._task = self._bar.add_task(
            "rounds", total=total, completed=opening.round, at=at, numbers="starting", answers=""
        )
        self._bar.start()

    def expecting(self, rounds: int) -> None:
        super().expecting(rounds)
        self._bar.update(self._task, total=rounds)

    def _at(self, round: int) -> str:
        return f"{round}/{self._rounds}" if self._rounds else str(round)

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        shown = {n: v for n, v in round.numbers.items() if n.startswith("test_") or n == "train_loss"}
        main = next((value for name, value in shown.items() if "loss" not in name), None)
        self._history += [] if main is None else [main]
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items())
        spark = _spark(self._history)
        at = self._at(round.number)
        self._bar.update(self._task, completed=round.number, at=at, numbers=f"{escape(text)}  {spark}", answers="")

    def on_answers(self, round: int, answered: int, asked: int) -> None:
        self._bar.update(self._task, answers=f"{answered}/{asked} answered" if answered < asked else "")

    def waiting(self, present: int, needed: int) -> None:
        text = f"waiting for clients: {present} of {needed} are connected" if present < needed else "starting"
        self._bar.update(self._task, numbers=text)

    def note(self, text: str) -> None:
        self.console.print(f"[yellow]![/yellow] {escape(text)}")

    def close(self) -> None:
        self._bar.stop()


class Json(Display):
    """One JSON object a line on standard output, ``event`` first; failures too."""

    for_programs = True

    def __init__(self) -> None:
        self._out = sys.stdout  # also while what a user's code prints goes elsewhere

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps(plain({"event": event, **fields})), flush=True, file=self._out)

    def starting(self, opening: Opening) -> None:
        o = opening
        self._print(
            "start",
            run=str(o.path),
            engine=o.engine,
            population=o.population,
            rounds=o.rounds,
            shards=o.shards,
        )

    def planned(self, line: str) -> None:
        self._print("measured", choice=line)

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self._print("round", round=round.number, **round.numbers)

    def on_failure(self, failure: Failure) -> None:
        self._print("failure", round=failure.round, client=failure.client, reason=failure.reason)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def finished(self, run: Run) -> None:
        self._print("end", run=str(run.path), **run.summary)


class Silent(Display):
    """Nothing but failures, on standard error."""

    def starting(self, opening: Opening) -> None:
        return

    def planned(self, line: str) -> None:
        return

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        return

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def finished(self, run: Run) -> None:
        return


def on_training(e: Experiment, parameters: int) -> str:
    """The model and how clients train it, in words."""
    model = e.model["name"] if isinstance(e.model, Mapping) else getattr(e.model, "__name__", type(e.model).__name__)
    model = e.model if isinstance(e.model, str) else model
    work = f"{e.local.steps} steps" if e.local.steps else f"epochs {e.local.epochs}"
    training = f"{e.local.optimizer} lr {e.local.lr:g}, batch {e.local.batch_size}, {work}"
    if e.client is not None:
        training = f"trained by {e.client['name'] if isinstance(e.client, Mapping) else type(e.client).__name__}"
    return f"{model}, {parameters:,} parameters · {training}"


def on_shards(s: Mapping[str, float]) -> str:
    """How the data lies, in words."""
    text = f"shards of {s['size_min']:.0f} to {s['size_max']:.0f} examples, median {s['size_median']:.0f}"
    if "total_variation" not in s:
        return text
    few, many = s["classes_min"], s["classes_max"]
    classes = f"{few:.0f} to {many:.0f} classes" if few < many else f"{many:.0f} classes each"
    return f"{text} · {classes}, {100 * s['total_variation']:.0f} % off the common mix"


def _line(round: Round, rounds: int) -> str:
    shown = [(n, v) for n, v in round.numbers.items() if n == "train_loss" or _headline(n)]
    text = "  ".join(f"{name} {value:.4f}" for name, value in shown)
    of = f"/{rounds}" if rounds else ""
    if round.number == 0:
        return f"round 0{of}  {text}"
    numbers = round.numbers
    counted = f"{numbers['counted']:.0f}/{numbers['asked']:.0f} clients"
    return f"round {round.number}{of}  {counted}  {text}  {numbers['seconds']:.2f} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _headline(name: str) -> bool:
    """What is worth a reader's eye: the test set, and of the clients' own tests the mean and the worst.

    Clients choose some of the names: one that nobody can read is not shown.
    """
    of_clients = name.startswith("clients_") and "loss" not in name and "weighted" not in name
    return name.isprintable() and (name.startswith("test_") or of_clients)


def _spark(values: list[float], width: int = 12) -> str:
    recent = [value for value in values[-width:] if math.isfinite(value)]
    if len(recent) < 2:
        return ""
    low, high = min(recent), max(recent)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in recent)


def _print_summary(console: Console, run: Run) -> None:
    s = run.summary
    mark = "✓" if s["status"] == "finished" else "■"
    console.print(f"{mark} {s['status']} after {s['rounds']} rounds in {s['wall_seconds']:.1f} s", markup=False)
    table = Table(box=None, padding=(0, 2), show_edge=False)
    ten = bool(s["mean_of_last_10"])
    for column in ("", "last", *(["mean of last 10"] if ten else []), "best"):
        table.add_column(column, justify="right" if column else "left")
    shown = {name: last for name, last in s.get("last", {}).items() if _headline(name)}
    for name, last in shown.items():
        best, called = s["best"][name], escape(name.replace("_", " "))
        mean = [_number(s["mean_of_last_10"].get(name))] if ten else []
        table.add_row(called, f"{last:.4f}", *mean, f"{best['value']:.4f} (round {best['round']})")
    if shown:
        console.print(table)
    for name, reached in s.get("target", {}).items():
        when = "not reached" if reached["round"] is None else f"reached in round {reached['round']}"
        console.print(f"  target {name} {reached['value']:g} {when}", markup=False)
    spent = [f"{_size(s['bytes_up'])} up", f"{_size(s['bytes_down'])} down"]
    spent += [f"{s['memory_mb']:.0f} MB of memory"] if s["memory_mb"] else []
    spent += [f"{s['failed']} client failures"] if s["failed"] else []
    console.print(f"  {', '.join(spent)}", markup=False)
    console.print(f"  run     {run.path}", markup=False)
    if s["status"] != "finished":
        how = f"not possible: {s['no_resume']}" if s.get("no_resume") else f"shoal resume {run.path}"
        console.print(f"  resume  {how}", markup=False)
