"""Running an experiment here: from the start, or from where an earlier run ended."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.compose import Composition
from shoal.experiment import UNNAMED, Experiment
from shoal.progress import Display, Opening, display
from shoal.protos.errors import ExperimentError, RunError, nearest
from shoal.protos.parameters import Segment
from shoal.run import Run, summarise
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Coordinator
from shoal.server.runs import RunFolder

__all__ = ["resume", "simulate"]

ENGINES = ("auto", "lean")
MAY_CHANGE = frozenset({"rounds", "evaluation", "target", "checkpoint_every"})


def simulate(
    experiment: Experiment, *, engine: str, workers: int | None, progress: str, out: Path, path: Path | None = None
) -> Run:
    """Run an experiment from the start; see :meth:`shoal.Experiment.simulate`. ``path`` is a folder of its own."""
    if engine not in ENGINES:
        raise ExperimentError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}")
    number, show = _workers(experiment, workers), display(progress)
    composition = Composition(experiment)
    with closing(RunFolder.create(out, experiment.name) if path is None else RunFolder.make(path)) as folder:
        folder.claim()
        folder.write("experiment.toml", experiment.toml())
        folder.write("env.json", _environment(composition, number))
        return _run(composition, folder, composition.start(), number, show)


def resume(
    path: str | Path, *, rounds: int | None = None, experiment: Experiment | None = None, progress: str = "auto"
) -> Run:
    """Go on with an interrupted run, to the same bits as if it had not been; ``rounds`` makes it longer.

    ``experiment`` is needed only if the run was made from Python objects that a file cannot name.
    """
    show = display(progress)
    with closing(RunFolder.open(Path(path))) as folder:
        folder.claim()
        return _resume(folder, experiment, rounds, show)


def _resume(folder: RunFolder, experiment: Experiment | None, rounds: int | None, show: Display) -> Run:
    kept = (folder.path / "experiment.toml").read_text(encoding="utf-8")
    experiment = _kept_experiment(folder, kept) if experiment is None else experiment
    experiment = experiment if rounds is None else replace(experiment, rounds=rounds)
    _check_same(kept, experiment.toml())
    composition, recorded = Composition(experiment), folder.read("env.json")
    point = folder.latest() or composition.start()
    composition.check(point)
    if point.round >= experiment.rounds:
        raise RunError(f"{folder.path} has all its {point.round} rounds; make it longer with --rounds (rounds=…)")
    folder.write("experiment.toml", experiment.toml())
    folder.rewind(point.round if point.round else -1)  # round 0, the initial model, is evaluated again
    folder.log("resumed", round=point.round, versions=_versions(), same=recorded["versions"] == _versions())
    return _run(composition, folder, point, int(recorded["workers"]), show)


def _kept_experiment(folder: RunFolder, kept: str) -> Experiment:
    first = kept.partition("\n")[0]
    if first.startswith(UNNAMED):
        raise RunError(
            f"{folder.path} was made from Python objects ({first.removeprefix(UNNAMED).strip()}); "
            f"resume it from Python with shoal.resume(path, experiment=...)"
        )
    return Experiment.from_file(folder.path / "experiment.toml")


def _check_same(kept: str, given: str) -> None:
    """A resumed run is the same experiment; only how long and how it is watched may change."""
    before, now = tomllib.loads(kept), tomllib.loads(given)
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            raise RunError(
                f"'{key}' differs from the run's own ({before.get(key)!r}, now {now.get(key)!r}); resume with the same "
                f"experiment, or start a new run"
            )


def _run(composition: Composition, folder: RunFolder, point: Checkpoint, workers: int, show: Display) -> Run:
    """To the end or to an interrupt; the summary says which, whatever happens."""
    experiment, began, status = composition.experiment, time.perf_counter(), "failed"
    folder.write("summary.json", {"status": "running", "name": experiment.name})
    engine = f"lean × {workers} workers" if workers else "lean, in this process"
    size, shards = point.layout.size(Segment.TRAINABLE), composition.shards
    try:
        show.starting(Opening(folder.path, experiment, len(composition.data.clients), size, engine, shards))
        with closing(composition.fleet(workers)) as fleet:
            coordinator = composition.coordinator(fleet, point, [folder, show])
            with _interruptible(coordinator, show):
                point = coordinator.run()
        status = "finished" if point.round >= experiment.rounds else "interrupted"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        ended = {"status": status, "name": experiment.name, "wall_seconds": time.perf_counter() - began}
        folder.write("summary.json", summarise(folder, experiment.target) | ended)
        show.close()
        if status != "failed":
            show.finished(Run(folder.path))
    return Run(folder.path)


def _workers(experiment: Experiment, workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise ExperimentError(f"workers is {workers}; it must be 0 (in this process) or more")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers if experiment.device == "cpu" else 1
    return workers


@contextmanager
def _interruptible(coordinator: Coordinator, show: Display) -> Iterator[None]:
    """First Ctrl-C (or SIGTERM): stop after this round. Second: abandon it, but never in the middle of a commit."""

    def handle(number: int, frame: FrameType | None) -> None:
        if coordinator.stopping and not coordinator.committing:
            raise KeyboardInterrupt
        coordinator.stop()
        show.note("stopping after this round; Ctrl-C again to abandon it")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("shoal", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _environment(composition: Composition, workers: int) -> dict[str, Any]:
    return {
        "engine": "lean",
        "workers": workers,
        "versions": _versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "population": len(composition.data.clients),
        "parameters": composition.initial.layout.size(Segment.TRAINABLE),
        "layout": composition.initial.layout.hash,
        "shards": composition.shards,
    }
