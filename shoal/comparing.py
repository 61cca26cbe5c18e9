"""Comparing strategies: each under the same seeds, one run a cell, the cells in worker processes.

The cells of one seed share shards, initial weights, cohorts and batches, because random streams are named by seed,
purpose, round and client (:mod:`shoal.protos.seeds`): what differs between them is the strategy.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from shoal import tuning
from shoal.arms import as_toml
from shoal.comparison import Comparison
from shoal.experiment import Experiment
from shoal.grid import Grid, lay_out
from shoal.making import make
from shoal.protos.errors import ExperimentError
from shoal.record import STORE, Record
from shoal.server.runs import RunFolder, list_runs
from shoal.strategies.base import Strategy
from shoal.tally import Tally, tally

__all__ = ["compare"]


def compare(
    experiment: Experiment,
    strategies: Sequence[Strategy | str],
    *,
    seeds: int = 3,
    target: Mapping[str, float] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    tune: int | None = None,
    search: Mapping[str, Sequence[Any]] | None = None,
    sampler: str = "random",
    engine: str = "lean",
    out: str | Path = "runs",
    workers: int | None = None,
    progress: str = "auto",
) -> Comparison:
    """Run an experiment with each strategy under each of ``seeds`` seeds, from the experiment's own on.

    A strategy may also be written as on the command line, ``"fedprox:mu=0.01|0.1"``. Differences are to the first one.
    ``vary`` repeats all of it in scenarios: ``{"data.partition.alpha": [0.1, 1.0]}``. ``target`` replaces the
    experiment's own; ``engine`` is one for all runs; ``workers`` are processes (None: one a core).

    With ``tune``, each arm first gets so many trials over what its text leaves open (``mu=0.01|0.1``, or a range
    ``mu=0.001..1``) and over ``search``, which is the same for all: ``{"local.lr": [0.03, 0.1]}``. They are judged by a
    fifth of the training rows, never by the test set. ``sampler`` is ``"random"`` or ``"optuna"``.

    Runs are kept in ``out/cells`` by what determines them. Those that are there are not made again, and one that was
    begun goes on: the same call after an interrupt, a crash or a kill ends as if nothing had happened, and one with
    more strategies or seeds makes only what is new. A cell that fails does not stop the others: the comparison's
    status then is ``"failed"``, and its table says what is missing. Ctrl-C ends it as ``"interrupted"``.
    """
    if isinstance(strategies, Strategy | str):
        raise ExperimentError("strategies is a single one; give a list, for example [shoal.FedAvg(), shoal.Scaffold()]")
    show, wanted = tally(progress), _search(tune, search, sampler)
    for key in (search or {}).keys() & (vary or {}).keys():
        raise ExperimentError(f"{key!r} is both varied and tuned; do one of the two")
    grid = lay_out(experiment, strategies, seeds, target, workers, vary, engine, tuned=wanted is not None)
    if wanted is not None:
        with _stoppable():
            grid = grid.with_choices(tuning.tune(grid, wanted, Path(out) / STORE, show), wanted.words)
    with closing(_folder(Path(out), grid)) as folder:
        folder.claim()
        folder.write("experiment.toml", grid.experiment.toml())
        folder.write("comparison.toml", grid.toml(folder.path))
        return _run(grid, folder, show)


def _search(tune: int | None, search: Mapping[str, Sequence[Any]] | None, sampler: str) -> tuning.Search | None:
    if tune is None:
        if search:
            raise ExperimentError("search says what is tuned; say with how many trials an arm, too: tune=8 (--tune 8)")
        return None
    return tuning.Search(
        tune, {key: [as_toml(value) for value in values] for key, values in (search or {}).items()}, sampler
    )


def _folder(out: Path, grid: Grid) -> RunFolder:
    """The one that this comparison has, from an earlier process; else a new one."""
    for folder in list_runs(out):
        if folder.has("comparison.toml") and Comparison(folder.path).description.get("key") == grid.key:
            return folder
    return RunFolder.create(out, f"{grid.experiment.name}-comparison")


def _run(grid: Grid, folder: RunFolder, show: Tally) -> Comparison:
    """To the end or to an interrupt."""
    record, status = Record(grid, folder), "failed"
    record.write("running")
    try:
        show.starting(folder.path, grid, len(record.summaries))
        with _stoppable(), closing(make(record.missing, record.store, grid.engine, grid.workers, show)) as results:
            for cell, ended in results:
                record.end(cell, ended)
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
