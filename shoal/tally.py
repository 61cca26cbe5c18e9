"""What a user sees while a comparison goes on: a live line on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoal.comparison import Comparison
from shoal.grid import Grid
from shoal.progress import Output
from shoal.protos.errors import ExperimentError, nearest
from shoal.server.runs import plain
from shoal.simulations.answer import on_significance, short_table
from shoal.simulations.comparison import main_metric

__all__ = ["Tally", "tally"]


class Tally(ABC):
    """Shows a comparison to someone."""

    @abstractmethod
    def starting(self, path: Path, grid: Grid, there: int) -> None:
        """Before the first cell; so many runs are there already."""

    def began(self, name: str) -> None:
        """A cell is under way."""
        return

    def tried(self, name: str, score: float) -> None:
        """Before the comparison: a trial of an arm's tuning has ended."""
        return

    @abstractmethod
    def ended(self, cell: Mapping[str, Any]) -> None:
        """A cell's line of the summary."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def finished(self, comparison: Comparison) -> None:
        return

    def close(self) -> None:
        return


def tally(mode: str) -> Tally:
    """``"auto"`` (live on a terminal, else plain), ``"plain"``, ``"json"`` or ``"none"``."""
    modes: dict[str, Callable[[], Tally]] = {"live": Live, "plain": Plain, "json": Json, "none": Silent}
    if mode == "auto":
        mode = "live" if Console(stderr=False).is_terminal else "plain"
    if mode not in modes:
        raise ExperimentError(f"there is no progress {mode!r}{nearest(mode, [*modes, 'auto'])}")
    return modes[mode]()


class Plain(Tally):
    """One line a cell."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Output(highlight=False, soft_wrap=True)
        self._done, self._grid = 0, None  # type: tuple[int, Grid | None]

    def starting(self, path: Path, grid: Grid, there: int) -> None:
        self._grid, self._done = grid, there
        for line in _heading(path, grid, there):
            self.console.print(line, markup=False)

    def tried(self, name: str, score: float) -> None:
        self.console.print(f"trial  {name}  {'failed' if score == -math.inf else f'{abs(score):.4f}'}", markup=False)

    def ended(self, cell: Mapping[str, Any]) -> None:
        assert self._grid is not None
        self._done += 1
        if cell["status"] == "failed":
            self.note(f"{_named(cell)} failed: {cell['reason']}\n{cell['traceback']}".rstrip())
            return
        metric = main_metric([cell], self._grid.target)
        last = cell["last"].get(metric)  # None if it never was finite
        value = f"{metric.removeprefix('test_')} {'–' if last is None else f'{last:.4f}'}"
        count = f"cell {self._done}/{len(self._grid.cells)}"
        self.console.print(f"{count}  {_named(cell)}  {value}  {cell['seconds']:.1f} s", markup=False)

    def note(self, text: str) -> None:
        self.console.print(f"! {text}", markup=False)

    def finished(self, comparison: Comparison) -> None:
        _print_summary(self.console, comparison)


class Live(Plain):
    """A bar over the cells with what is running now, above it each cell that ended."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._running: list[str] = []
        self._task: TaskID | None = None  # none while arms are tuned
        self._bar = Progress(
            TextColumn("cells {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[running]}"),
            console=self.console,
        )

    def starting(self, path: Path, grid: Grid, there: int) -> None:
        super().starting(path, grid, there)
        self._running.clear()
        self._task = self._bar.add_task("cells", total=len(grid.cells), completed=there, running="starting")
        self._bar.start()

    def began(self, name: str) -> None:
        self._running = [*(other for other in self._running if other != name), name]
        self._update()

    def ended(self, cell: Mapping[str, Any]) -> None:
        super().ended(cell)
        self._running.remove(_named(cell))
        self._update()

    def _update(self) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, running=escape(" · ".join(self._running)))

    def close(self) -> None:
        self._bar.stop()


class Json(Tally):
    """One JSON object a line on standard output, ``event`` first."""

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps(plain({"event": event, **fields})), flush=True)

    def starting(self, path: Path, grid: Grid, there: int) -> None:
        self._print(
            "start",
            comparison=str(path),
            arms=list(grid.arms),
            seeds=list(grid.seeds),
            scenarios=list(grid.scenarios),
            cells=len(grid.cells),
            reused=there,
            workers=grid.workers,
            engine=grid.engine,
        )

    def tried(self, name: str, score: float) -> None:
        self._print("trial", name=name, score=score)

    def ended(self, cell: Mapping[str, Any]) -> None:
        self._print("cell", **cell)

    def finished(self, comparison: Comparison) -> None:
        kept = ("status", "metric", "target", "wall_seconds", "answer", "table")
        self._print("end", comparison=str(comparison.path), **{name: comparison.summary[name] for name in kept})


class Silent(Tally):
    """Nothing but failures, on standard error."""

    def starting(self, path: Path, grid: Grid, there: int) -> None:
        return

    def ended(self, cell: Mapping[str, Any]) -> None:
        if cell["status"] == "failed":
            self.note(f"{_named(cell)} failed: {cell['reason']}\n{cell['traceback']}".rstrip())


def _named(cell: Mapping[str, Any]) -> str:
    """As :attr:`shoal.grid.Cell.name`."""
    return ", ".join([cell["arm"], *([cell["scenario"]] if cell["scenario"] else []), f"seed {cell['seed']}"])


def _heading(path: Path, grid: Grid, there: int) -> list[str]:
    seeds, first = grid.seeds, f", {grid.scenarios[0]}" if grid.scenarios[0] else ""
    numbers = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    axes = [" · ".join(names) for names in (grid.arms, grid.scenarios) if any(names)]
    rounds, clients, data, model = (grid.setup[f"{name}{first}"] for name in ("rounds", "clients", "data", "model"))
    shards = [f"  {text}" for name, text in grid.setup.items() if name.startswith("shards")]
    have = f", of which {there} are there" if there else ""
    return [
        f"shoal · {path}",
        f"  {' × '.join([*axes, numbers])}: {len(grid.cells)} runs of {rounds} rounds{have}",
        f"  clients {clients} · {data}",
        *shards[:1],
        f"  {model}",
        f"  engine {grid.engine}, on {grid.workers} {'core' if grid.workers == 1 else 'cores'}",
    ]


def _print_summary(console: Console, comparison: Comparison) -> None:
    s, rows = comparison.summary, comparison.rows
    mark, done = "✓" if s["status"] == "finished" else "■", sum(row.finished for row in rows)
    console.print(f"{mark} {s['status']}: {done} of {len(s['cells'])} cells in {s['wall_seconds']:.1f} s", markup=False)
    table = Table(box=None, padding=(0, 1), show_edge=False)
    lines = short_table(rows)
    for column, *cells in zip(*lines, strict=True):
        width = max(map(len, [column, *cells]))  # nothing is cut, however short the terminal's lines are
        left = column in ("scenario", "strategy")
        table.add_column(column, justify="left" if left else "right", no_wrap=True, min_width=width)
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    console.print(table)
    console.print("  [ ]: 95 % confidence interval over seeds; differences are taken seed by seed", markup=False)
    if on_significance(rows) not in comparison.answer:
        console.print(f"  {on_significance(rows)}", markup=False)
    console.print(f"{comparison.answer}", markup=False)
    console.print(f"  report  {comparison.path / 'report.html'}", markup=False)
