"""What a user sees while a comparison goes on: a live line on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoal.cell import ENGINE
from shoal.comparison import Comparison
from shoal.grid import Grid
from shoal.progress import Output
from shoal.protos.errors import ExperimentError, nearest
from shoal.server.runs import plain
from shoal.simulations.comparison import headings, main_metric, on_significance, texts

__all__ = ["Tally", "tally"]


class Tally(ABC):
    """Shows a comparison to someone."""

    @abstractmethod
    def starting(self, path: Path, grid: Grid) -> None: ...

    def began(self, name: str) -> None:
        """A cell is under way."""
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

    def starting(self, path: Path, grid: Grid) -> None:
        self._grid = grid
        for line in _heading(path, grid):
            self.console.print(line, markup=False)

    def ended(self, cell: Mapping[str, Any]) -> None:
        assert self._grid is not None
        self._done += 1
        if cell["status"] == "failed":
            said = f"failed: {cell['reason']}"
            self.note(f"{cell['arm']}, seed {cell['seed']} {said}\n{cell['traceback']}".rstrip())
            return
        metric = main_metric([cell], self._grid.target)
        last = cell["last"].get(metric)  # None if it never was finite
        value = f"{metric.removeprefix('test_')} {'–' if last is None else f'{last:.4f}'}"
        count = f"cell {self._done}/{len(self._grid.cells)}"
        self.console.print(
            f"{count}  {cell['arm']}, seed {cell['seed']}  {value}  {cell['seconds']:.1f} s", markup=False
        )

    def note(self, text: str) -> None:
        self.console.print(f"! {text}", markup=False)

    def finished(self, comparison: Comparison) -> None:
        _print_summary(self.console, comparison)


class Live(Plain):
    """A bar over the cells with what is running now, above it each cell that ended."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._running: list[str] = []
        self._bar = Progress(
            TextColumn("cells {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[running]}"),
            console=self.console,
        )

    def starting(self, path: Path, grid: Grid) -> None:
        super().starting(path, grid)
        self._task = self._bar.add_task("cells", total=len(grid.cells), running="starting")
        self._bar.start()

    def began(self, name: str) -> None:
        self._running = [*(other for other in self._running if other != name), name]
        self._update()

    def ended(self, cell: Mapping[str, Any]) -> None:
        super().ended(cell)
        self._running.remove(f"{cell['arm']}, seed {cell['seed']}")
        self._update()

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._done, running=escape(" · ".join(self._running)))

    def close(self) -> None:
        self._bar.stop()


class Json(Tally):
    """One JSON object a line on standard output, ``event`` first."""

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps(plain({"event": event, **fields})), flush=True)

    def starting(self, path: Path, grid: Grid) -> None:
        self._print(
            "start",
            comparison=str(path),
            arms=list(grid.arms),
            seeds=list(grid.seeds),
            cells=len(grid.cells),
            workers=grid.workers,
            engine=ENGINE,
        )

    def ended(self, cell: Mapping[str, Any]) -> None:
        self._print("cell", **cell)

    def finished(self, comparison: Comparison) -> None:
        kept = ("status", "metric", "target", "wall_seconds", "table")
        self._print("end", comparison=str(comparison.path), **{name: comparison.summary[name] for name in kept})


class Silent(Tally):
    """Nothing but failures, on standard error."""

    def starting(self, path: Path, grid: Grid) -> None:
        return

    def ended(self, cell: Mapping[str, Any]) -> None:
        if cell["status"] == "failed":
            self.note(f"{cell['arm']}, seed {cell['seed']} failed: {cell['reason']}\n{cell['traceback']}".rstrip())


def _heading(path: Path, grid: Grid) -> list[str]:
    setup, seeds = grid.setup, grid.seeds
    numbers = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    shards = [f"  {text}" for name, text in setup.items() if name.startswith("shards")]
    return [
        f"shoal · {path}",
        f"  {' · '.join(grid.arms)} × {numbers}: {len(grid.cells)} runs of {setup['rounds']} rounds",
        f"  clients {setup['clients']} · {setup['data']}",
        *shards[:1],
        f"  {setup['model']}",
        f"  engine {ENGINE}, {grid.workers} worker processes",
    ]


def _print_summary(console: Console, comparison: Comparison) -> None:
    s, rows = comparison.summary, comparison.rows
    mark, done = "✓" if s["status"] == "finished" else "■", sum(row.finished for row in rows)
    console.print(f"{mark} {s['status']}: {done} of {len(s['cells'])} cells in {s['wall_seconds']:.1f} s", markup=False)
    table = Table(box=None, padding=(0, 1), show_edge=False)
    lines = [headings(s["metric"], s["target"]), *map(texts, rows)]
    for column, *cells in zip(*lines, strict=True):
        width = max(map(len, [column, *cells]))  # nothing is cut, however short the terminal's lines are
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True, min_width=width)
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    console.print(table)
    console.print(f"  difference: to {rows[0].strategy}, seed by seed; ± standard deviation over seeds", markup=False)
    console.print(f"  {on_significance(rows[0].seeds)}", markup=False)
    console.print(f"  report  {comparison.path / 'report.html'}", markup=False)
