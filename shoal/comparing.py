"""Comparing strategies: each under the same seeds, one run a cell, the cells in worker processes.

The cells of one seed share shards, initial weights, cohorts and batches, because random streams are named by seed,
purpose, round and client (:mod:`shoal.protos.seeds`): what differs between them is the strategy.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.cell import Ended, Order
from shoal.comparison import Comparison, as_csv
from shoal.experiment import Experiment
from shoal.grid import Cell, Grid, lay_out
from shoal.protos.errors import ExperimentError, RunError
from shoal.server.runs import RunFolder
from shoal.simulations.comparison import main_metric, rows
from shoal.simulations.crew import Crew, Died
from shoal.simulations.packing import pack
from shoal.simulations.shared import SharedBlock
from shoal.strategies.base import Strategy
from shoal.tally import Tally, tally

__all__ = ["compare"]


def compare(
    experiment: Experiment,
    strategies: Sequence[Strategy | str],
    *,
    seeds: int = 3,
    target: Mapping[str, float] | None = None,
    out: str | Path = "runs",
    workers: int | None = None,
    progress: str = "auto",
) -> Comparison:
    """Run an experiment with each strategy under each of ``seeds`` seeds, from the experiment's own on.

    A strategy may also be written as on the command line, ``"fedprox:mu=0.1"``. Differences are to the first one.
    ``target`` replaces the experiment's own; ``workers`` are processes (None: one a core). A cell that fails does not
    stop the others: the comparison's status then is ``"failed"``, and its table says what is missing. Ctrl-C ends it
    as ``"interrupted"``; what was finished is kept.
    """
    if isinstance(strategies, Strategy | str):
        raise ExperimentError("strategies is a single one; give a list, for example [shoal.FedAvg(), shoal.Scaffold()]")
    show, grid = tally(progress), lay_out(experiment, strategies, seeds, target, workers)
    packed, block = _pack(grid)
    with closing(block), closing(RunFolder.create(Path(out), f"{experiment.name}-comparison")) as folder:
        folder.claim()
        folder.write("experiment.toml", grid.experiment.toml())
        folder.write("comparison.toml", grid.toml(folder.path))
        return _run(grid, packed, folder, show)


def _pack(grid: Grid) -> tuple[bytes, SharedBlock]:
    try:
        packed, block = pack([cell.experiment for cell in grid.cells])
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ExperimentError(f"the experiment cannot be sent to a worker process: {error}") from error
    return pickle.dumps(packed), block


def _run(grid: Grid, packed: bytes, folder: RunFolder, show: Tally) -> Comparison:
    """To the end or to an interrupt; after each cell, the folder holds what is known."""
    record, status = _Record(grid, folder), "failed"
    record.write("running")
    try:
        show.starting(folder.path, grid)
        with _stoppable(), closing(_results(grid, packed, folder.path, show)) as results:
            for cell, ended in results:
                record.ended[cell] = ended
                record.write("running")
                show.ended(record.line(cell))
        status = record.status
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        record.write(status)
        show.close()
    done = Comparison(folder.path)
    done.write_report()
    show.finished(done)
    return done


def _results(grid: Grid, packed: bytes, path: Path, show: Tally) -> Generator[tuple[Cell, Ended]]:
    """How each cell ended, as it does. One whose worker was lost is run once more, on another worker."""
    waiting, running, again = deque(grid.cells), dict[Future[Ended | Died], Cell](), set[Cell]()
    with closing(Crew("shoal.cell", packed, grid.workers)) as crew:
        while waiting or running:
            while waiting and len(running) < grid.workers:
                cell = waiting.popleft()
                show.began(cell.name)
                order = Order(grid.cells.index(cell), cell.name, path / cell.folder)
                running[crew.submit(order)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, answer = running.pop(future), future.result()
                if isinstance(answer, Ended):
                    yield cell, answer
                elif cell in again:
                    yield cell, Ended(0.0, f"its worker process was lost twice ({answer.reason})")
                else:
                    show.note(f"{cell.name}: its worker process was lost ({answer.reason}); running it again")
                    shutil.rmtree(path / cell.folder, ignore_errors=True)
                    again.add(cell)
                    waiting.appendleft(cell)


class _Record:
    """What is known of the cells so far."""

    def __init__(self, grid: Grid, folder: RunFolder) -> None:
        self._grid, self._folder, self._began = grid, folder, time.perf_counter()
        self.ended: dict[Cell, Ended] = {}

    @property
    def status(self) -> str:
        """That of the comparison, once all cells have ended."""
        return "failed" if any(ended.reason for ended in self.ended.values()) else "finished"

    def line(self, cell: Cell) -> dict[str, Any]:
        """One cell: where it is, how it ended, its last numbers."""
        line: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed, "path": cell.folder}
        ended = self.ended.get(cell)
        if ended is None:
            return line | {"status": "unfinished"}
        line |= {"status": "failed" if ended.reason else "finished", "seconds": ended.seconds}
        if ended.reason:
            return line | {"reason": ended.reason, "traceback": ended.traceback}
        return line | {"last": self._summary(cell)["last"]}

    def write(self, status: str) -> None:
        """Bring the folder's summary and table up to date."""
        grid, seconds = self._grid, time.perf_counter() - self._began
        finished = {(c.arm, c.seed): self._summary(c) for c, ended in self.ended.items() if not ended.reason}
        metric = main_metric(finished.values(), grid.target)
        table = rows(list(grid.arms), grid.seeds, finished, metric, grid.target)
        self._folder.write("table.csv", as_csv(table))
        self._folder.write(
            "summary.json",
            {
                "status": status,
                "name": grid.experiment.name,
                "rounds": grid.experiment.rounds,
                "metric": metric,
                "target": grid.target,
                "wall_seconds": seconds,
                "workers": grid.workers,
                "table": [asdict(row) for row in table],
                "cells": [self.line(cell) for cell in grid.cells],
            },
        )

    def _summary(self, cell: Cell) -> dict[str, Any]:
        try:
            return RunFolder(self._folder.path / cell.folder).read("summary.json")
        except RunError as error:
            raise RunError(f"the run of {cell.name} is gone while the comparison goes on: {error}") from error


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, whoever started this process and how."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
