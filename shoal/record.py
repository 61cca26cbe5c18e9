"""What is known of a comparison's cells, and the files that say it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.cell import Ended
from shoal.comparison import as_csv
from shoal.grid import Cell, Grid
from shoal.protos.errors import RunError
from shoal.run import fairness, summarise
from shoal.server.runs import RunFolder
from shoal.simulations.answer import answer, latex
from shoal.simulations.comparison import main_metric, rows

__all__ = ["STORE", "Record", "finished", "summary_of"]

STORE = "cells"  # beside the comparisons, which share it


def finished(path: Path) -> bool:
    """Whether a folder holds a run that has come to its end."""
    try:
        return bool(RunFolder(path).read("summary.json")["status"] == "finished")
    except (RunError, KeyError):
        return False


def summary_of(path: Path, target: Mapping[str, float]) -> dict[str, Any]:
    """Of a run that is there, with the target of whoever asks and the spread over its clients."""
    folder = RunFolder(path)
    spread = {name: asdict(found) for name, found in fairness(folder).items()}
    return folder.read("summary.json") | summarise(folder, target) | {"fairness": spread}


class Record:
    """Cells that were there, and those that have ended since."""

    def __init__(self, grid: Grid, folder: RunFolder) -> None:
        self._grid, self._folder, self._began = grid, folder, time.perf_counter()
        self.store = folder.path.parent / STORE
        self.ended = dict[Cell, Ended]()
        self.summaries = {cell: self._summary(cell) for cell in grid.cells if finished(self.store / cell.key)}

    @property
    def missing(self) -> Sequence[Cell]:
        """The cells to run."""
        return [cell for cell in self._grid.cells if cell not in self.summaries]

    def end(self, cell: Cell, ended: Ended) -> None:
        self.ended[cell] = ended
        if not ended.reason:
            self.summaries[cell] = self._summary(cell)

    @property
    def status(self) -> str:
        """That of the comparison, once all cells have ended."""
        return "failed" if any(ended.reason for ended in self.ended.values()) else "finished"

    def line(self, cell: Cell) -> dict[str, Any]:
        """One cell: where it is, how it ended, its last numbers; ``seconds`` are those of its rounds."""
        path = os.path.relpath(self.store / cell.key, self._folder.path)
        line: dict[str, Any] = {"scenario": cell.scenario, "arm": cell.arm, "seed": cell.seed, "path": path}
        if cell in self.summaries:
            kept = ("rounds", "seconds", "stopped", "last", "best", "target")
            found = {name: self.summaries[cell][name] for name in kept if name in self.summaries[cell]}
            return line | {"status": "finished", "reused": cell not in self.ended} | found
        ended = self.ended.get(cell)
        if ended is None:
            return line | {"status": "unfinished"}
        return line | {"status": "failed", **asdict(ended)}

    def write(self, status: str) -> None:
        """Bring the summary up to date; the table waits for the end."""
        grid, seconds = self._grid, time.perf_counter() - self._began
        metric = main_metric(self.summaries.values(), grid.target)
        said: dict[str, Any] = {
            "status": status,
            "name": grid.experiment.name,
            "rounds": grid.experiment.rounds,
            "metric": metric,
            "target": grid.target,
            "wall_seconds": seconds,
            "workers": grid.workers,
            "cells": [self.line(cell) for cell in grid.cells],
        }
        if status != "running":
            ready = {(c.scenario, c.arm, c.seed): summary for c, summary in self.summaries.items()}
            table = rows(grid.scenarios, list(grid.arms), grid.seeds, ready, metric, grid.target)
            said |= {"answer": answer(table), "table": [asdict(row) for row in table]}
            self._folder.write("table.csv", as_csv(table))
            self._folder.write("table.tex", latex(table))
        self._folder.write("summary.json", said)

    def _summary(self, cell: Cell) -> dict[str, Any]:
        return summary_of(self.store / cell.key, self._grid.target)
