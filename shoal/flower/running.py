"""Running a Flower app on Shoal's processes: from the start, or from where an earlier run of it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import Context
from flwr.serverapp import ServerApp

from shoal.client.process import collecting_less, keep_memory
from shoal.flower.app import App, FlowerApp
from shoal.flower.arrays import quick_arrays
from shoal.flower.compat import SERVER, context, empty_run, identify, logging_to
from shoal.flower.drawing import drawing_from
from shoal.flower.enough import enough
from shoal.flower.grid import Nodes, ShoalGrid, node_ids
from shoal.flower.ledger import Ledger
from shoal.flower.records import quick_records
from shoal.flower.rounds import watched
from shoal.flower.session import EVERY, Session, read_point
from shoal.flower.stage import InProcess, Stage
from shoal.flower.sums import quick_sums
from shoal.flower.workers import Workers
from shoal.memory import memory_mb
from shoal.progress import Display, Opening, display
from shoal.protos import seeds
from shoal.protos.errors import ExperimentError, RunError
from shoal.run import Run, summarise
from shoal.server.callbacks import Callback
from shoal.server.runs import RunFolder
from shoal.versions import versions

__all__ = ["Execution", "Play", "played", "resume"]


def played(play: Play, out: Path, progress: str) -> Run:
    """A new run. What is wrong with the app is said before there is a folder."""
    show = display(progress)
    with play.ready() as (server, stage), closing(RunFolder.create(out, play.app.name)) as folder:
        folder.claim()
        execution = play.execution(folder, show, server, stage)
        folder.write("experiment.toml", play.toml())
        folder.write("env.json", execution.play.environment())
        return execution.run(None)


def resume(folder: RunFolder, show: Display) -> Run:
    """Go on with a run that this process has claimed; RunError where its app does not allow it."""
    summary = folder.read("summary.json")
    if summary.get("status") == "finished":
        raise RunError(f"{folder.path} has finished; start a new run of its app with another number of rounds")
    if summary.get("no_resume"):
        raise RunError(f"{folder.path} cannot be resumed: {summary['no_resume']}; start a new run")
    point = read_point(folder.path)
    if point is None:
        raise RunError(f"{folder.path} ended before a round was kept; start a new run")
    play = _read(folder)
    if play.app.hash != folder.read("env.json")["app"]:
        show.note("the app's files have changed since the run began")
    with play.ready() as (server, stage):
        folder.rewind(point["round"])
        return play.execution(folder, show, server, stage).run(point)


def _read(folder: RunFolder) -> Play:
    if "served" not in folder.read("env.json"):
        return Play.read(folder)
    from shoal.flower.serving import Served  # which is made of what is here

    return Served.read(folder)


@dataclass(frozen=True)
class Play:
    """What is to be run, and where: ``workers`` is None only on Ray, where it means one for each CPU."""

    app: App
    nodes: int
    seed: int
    workers: int | None
    on_ray: bool = False
    ray_address: str | None = None
    every = EVERY

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ExperimentError(f"nodes is {self.nodes}; an app needs at least one")
        if not self.on_ray and (self.workers or 0) < 0:
            raise ExperimentError(f"workers is {self.workers}; it must be 0 (in this process) or more")

    @property
    def run_id(self) -> int:
        return seeds.integer(self.seed, "flower-run")

    @contextmanager
    def ready(self) -> Iterator[tuple[ServerApp, Stage]]:
        """Both apps loaded, and what plays the clients; while it lasts, random draws are the seed's."""
        with ExitStack() as stack:
            keep_memory()
            stack.enter_context(quick_arrays())
            stack.enter_context(quick_records())
            stack.enter_context(quick_sums())
            stack.enter_context(self.app.importable())
            stack.enter_context(drawing_from(seeds.integer(self.seed, "flower-server")))
            identify(self.run_id)
            workers = stack.enter_context(closing(self._workers())) if self.workers and not self.on_ray else None
            server = self.app.server_app()  # while they start
            stage = workers or stack.enter_context(closing(self.stage()))
            if workers is not None:
                workers.ready()
            stack.enter_context(collecting_less())
            yield server, stage

    def _workers(self) -> Workers:
        assert self.workers
        return Workers(self.app, self.run_id, min(self.workers, self.nodes))

    def stage(self) -> Stage:
        """What plays the clients, where no processes of this machine do."""
        if self.on_ray:
            from shoal.flower.cluster import Cluster

            return Cluster(self.app, self.run_id, self.workers and min(self.workers, self.nodes), self.ray_address)
        return InProcess(self.app.client_app())

    def execution(self, folder: RunFolder, show: Display, server: ServerApp, stage: Stage) -> Execution:
        """A run of it, with what :meth:`ready` gave."""
        return Execution(self, folder, show, server, stage)

    def contexts(self) -> list[Context]:
        """A node's, for each client."""
        shared = dict(self.app.config)
        return [
            context(self.run_id, node, {"partition-id": i, "num-partitions": self.nodes}, shared)
            for i, node in enumerate(node_ids(self.seed, self.nodes))
        ]

    def toml(self) -> str:
        """The run as its folder describes it."""
        where = {"workers": self.workers, "ray": self.on_ray, "ray_address": self.ray_address}
        given = {key: value for key, value in where.items() if value is not None}
        flower = {**self.app.describe(), "nodes": self.nodes, **given}
        return tomli_w.dumps({"name": self.app.name, "seed": self.seed, "flower": flower})

    @classmethod
    def read(cls, folder: RunFolder) -> Play:
        """The inverse of :meth:`toml`, with the app as it is now."""
        kept = tomllib.loads(folder.experiment())
        flower = kept["flower"]
        app, ray = FlowerApp.read(flower["app"], flower["config"]), flower.get("ray", False)
        return cls(app, flower["nodes"], kept["seed"], flower.get("workers"), ray, flower.get("ray_address"))

    def environment(self) -> dict[str, Any]:
        """What ``env.json`` says."""
        return {
            "engine": str(self),
            "versions": versions() | {"flwr": version("flwr")},
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "command": sys.argv,
            "population": self.nodes,
            "app": self.app.hash,
        }

    def __str__(self) -> str:
        if self.on_ray:
            return f"Flower apps on {f'Ray at {self.ray_address}' if self.ray_address else 'a Ray of its own'}"
        where = f"{min(self.workers, self.nodes)} worker processes" if self.workers else "this process"
        return f"Flower apps in {where}"


@dataclass
class Execution:
    """One run of an app, from a point (None: the start) on.

    ``ready`` waits for the clients and says which one is which node (None: they are there, and have but numbers);
    ``observers`` hear of rounds beside the folder and whoever watches; ``finished`` is called if the run has finished.
    """

    play: Play
    folder: RunFolder
    show: Display
    server: ServerApp
    stage: Stage
    ready: Callable[[], Mapping[int, str]] | None = None
    observers: Sequence[Callback] = ()
    finished: Callable[[], None] = lambda: None
    _began: float = field(default_factory=time.perf_counter)

    def run(self, point: dict[str, Any] | None) -> Run:
        nodes = Nodes(self.play.contexts())
        session = Session(self.folder, nodes, self.show, point, self.play.every)
        status, problem = "failed", ""
        self.folder.write("summary.json", {"status": "running", "name": self.play.app.name})
        try:
            self.show.starting(self._opening(session.round))
            with self._surroundings():
                ledger = Ledger([self.folder, self.show, *self.observers], self._names(nodes), session.round + 1)
                grid = ShoalGrid(self._run(), nodes, self.stage, ledger, self.play.seed)
                with watched(grid, ledger, session), enough(len(nodes)):
                    self._serve(grid)
            ledger.close()
            _check_answered(ledger)
            status = "finished"
            self.finished()
        except KeyboardInterrupt:
            status = "interrupted"
        except RunError as error:
            problem = str(error)
            raise
        finally:
            session.no_resume = session.no_resume or self.play.app.no_resume
            self._end(session, status, problem)
        return Run(self.folder.path)

    def _names(self, nodes: Nodes) -> Mapping[int, str]:
        if self.ready is not None:
            return self.ready()
        return {node.context.node_id: str(node.context.node_config["partition-id"]) for node in nodes.values()}

    def _serve(self, grid: ShoalGrid) -> None:
        """The app's own server, whose errors become one of ours."""
        app = self.play.app
        about = context(self.play.run_id, SERVER, {}, dict(app.config))
        try:
            self.server(grid=grid, context=about)
        except RunError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:
                return
            shown = "".join(traceback.format_exception(error))
            self.folder.log("server failed", reason=str(error), traceback=shown)
            self.show.note(shown.rstrip())
            raise RunError(f"the ServerApp of {app.name} raised {type(error).__name__}: {error}") from error

    def _run(self) -> Any:
        return empty_run(self.play.run_id, self.play.app.name, self.play.app.version)

    def _opening(self, done: int) -> Opening:
        play = self.play
        config = "  ".join(f"{key} {value}" for key, value in play.app.config.items())
        about = " ".join(filter(None, ("Flower app", play.app.name, play.app.version)))
        heading = [f"  {about} · {play.nodes} nodes · seed {play.seed}", *([f"  {config}"] if config else [])]
        return Opening(self.folder.path, heading, 0, play.nodes, str(play), round=done)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What the app prints is no part of our output; what flwr logs goes to a file, its warnings to the user too."""
        with ExitStack() as stack:
            handler = stack.enter_context(closing(_Log(self.folder.path / "flower.log", self.show)))
            stack.enter_context(logging_to(handler))
            if self.show.for_programs:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(_terminable())
            yield

    def _end(self, session: Session, status: str, problem: str) -> None:
        session.end()
        ended = {"status": status, "name": self.play.app.name, "wall_seconds": time.perf_counter() - self._began}
        ended |= {"memory_mb": memory_mb(), "flower": True}
        ended |= {"problem": problem} if problem else {}
        ended |= {"no_resume": session.no_resume} if session.no_resume else {}
        self.folder.write("summary.json", summarise(self.folder, {}) | ended)
        self.show.close()
        if status != "failed":
            self.show.finished(Run(self.folder.path))


def _check_answered(ledger: Ledger) -> None:
    for kind, asked in ledger.asked.items():
        if not ledger.answered[kind]:
            raise RunError(f"none of the {asked} {kind} messages was answered; see the failures in the run folder")


class _Log(logging.FileHandler):
    """Everything into a file; warnings also to whoever watches."""

    def __init__(self, path: Path, show: Display) -> None:
        super().__init__(path, encoding="utf-8")
        self._show = show
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if record.levelno >= logging.WARNING:
            self._show.note(f"flwr: {record.getMessage().strip()}")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
