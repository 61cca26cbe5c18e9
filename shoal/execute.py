"""One run, from a point on to its end or to an interrupt: what simulation and deployment have in common."""

from __future__ import annotations

import copy
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from shoal.compose import Composition
from shoal.memory import memory_mb
from shoal.progress import Display, Opening
from shoal.protos.parameters import Segment
from shoal.run import Run, summarise
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Coordinator
from shoal.server.fleet import Fleet
from shoal.server.runs import RunFolder
from shoal.versions import versions

__all__ = ["Execution", "come_back", "environment"]

PARTING = 10.0  # seconds for an abandoned round to leave everything in order


@dataclass(frozen=True)
class Execution:
    """How a run is to be executed.

    ``engine``, ``population`` and ``shards`` are what is shown of the clients. ``ready`` is called before the first
    round and returns when it may begin. ``watch`` makes those who are told of everything before folder and display
    are, given the value from which the run goes on; ``callbacks`` and the experiment's own are told after them.
    ``grace`` is how many seconds a round gets to end after an interrupt, of which ``stopping`` hears; None: any time.
    """

    composition: Composition
    folder: RunFolder
    show: Display
    engine: str
    population: int
    make_fleet: Callable[[], Fleet]
    shards: Mapping[str, float] = field(default_factory=dict)
    ready: Callable[[Coordinator], None] = lambda coordinator: None
    watch: Callable[[Checkpoint], Sequence[Callback]] = lambda point: ()
    callbacks: Sequence[Callback] = ()
    grace: float | None = None
    stopping: Callable[[], None] = lambda: None

    def run(self, point: Checkpoint) -> Run:
        """To the end or to an interrupt; the summary says which, whatever happens."""
        experiment, folder, show = self.composition.experiment, self.folder, self.show
        began, status, memory = time.perf_counter(), "failed", memory_mb()
        folder.write("summary.json", {"status": "running", "name": experiment.name})
        try:
            size = point.layout.size(Segment.TRAINABLE)
            opening = Opening.of(folder.path, experiment, self.population, size, self.engine, self.shards, point.round)
            show.starting(opening)
            with closing(self.make_fleet()) as fleet:
                fleet.keep_in(folder.path)
                own = copy.deepcopy(experiment.callbacks)
                told = [*self.watch(point), folder, show, *self.callbacks, *own]
                coordinator = self.composition.coordinator(fleet, point, told, folder.path)
                try:
                    with _interruptible(coordinator, show, self.grace, self.stopping):
                        self.ready(coordinator)
                        point = coordinator.run()
                finally:
                    memory = memory_mb()  # before the workers end
            status = "finished" if point.round >= experiment.rounds or point.stopped else "interrupted"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            ended = {"status": status, "name": experiment.name, "wall_seconds": time.perf_counter() - began}
            ended |= {"stopped": point.stopped} if point.stopped else {}
            folder.write("summary.json", summarise(folder, experiment.target) | ended | {"memory_mb": memory})
            show.close()
            if status != "failed":
                show.finished(Run(folder.path))
        return Run(folder.path)


def come_back(composition: Composition, folder: RunFolder) -> Checkpoint:
    """Where an earlier process left the run; what it recorded after that is dropped."""
    point = folder.latest() or composition.start()
    composition.check(point)
    folder.rewind(point.round if point.round else -1)  # round 0, the initial model, is evaluated again
    before = folder.read("env.json")["versions"]
    folder.log("resumed", round=point.round, versions=versions(), same=before == versions())
    return point


@contextmanager
def _interruptible(
    coordinator: Coordinator, show: Display, grace: float | None, stopping: Callable[[], None]
) -> Iterator[None]:
    """First Ctrl-C (or SIGTERM): stop after this round. Second, or the end of the grace: abandon it.

    Never in the middle of a commit.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if coordinator.stopping and not coordinator.committing:
            if grace is not None:
                signal.setitimer(signal.ITIMER_REAL, PARTING)  # or the next alarm would cut off what is to be kept
            raise KeyboardInterrupt
        if not coordinator.stopping:
            coordinator.stop()
            stopping()
            show.note("stopping after this round; Ctrl-C again to abandon it")
        if grace is not None:
            signal.setitimer(signal.ITIMER_REAL, grace, 0.1)  # again at once if it comes during a commit

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if grace is None else [signal.SIGALRM])]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        if grace is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(composition: Composition, engine: str, workers: int | None, population: int | None) -> dict[str, Any]:
    """What ``env.json`` says."""
    return {
        "engine": engine,
        "workers": workers,
        "versions": versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "population": population,
        "parameters": composition.initial.layout.size(Segment.TRAINABLE),
        "layout": composition.initial.layout.hash,
        "shards": composition.shards,
    }
