"""Composition: an experiment becomes data, fleet, coordinator and run folder, and runs."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from shoal.client.data import Shard
from shoal.client.losses import cross_entropy, loss_named
from shoal.client.net import Net, parameters_of
from shoal.client.participant import evaluate
from shoal.experiment import UNNAMED, Experiment
from shoal.progress import Display, display
from shoal.protos.errors import DataError, ExperimentError, RunError, nearest
from shoal.protos.parameters import Parameters, Segment
from shoal.run import Run, summarise
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Coordinator, Plan, start
from shoal.server.runs import RunFolder
from shoal.simulations.datasets import Dataset
from shoal.simulations.engine import Assignment, build_module
from shoal.simulations.federated import ArrayData
from shoal.simulations.fleet import SimulatedFleet

__all__ = ["resume", "simulate"]

ENGINES = ("auto", "lean")


def simulate(experiment: Experiment, *, engine: str, workers: int | None, out: Path, progress: str) -> Run:
    """Run an experiment from the start; see :meth:`shoal.Experiment.simulate`."""
    if engine not in ENGINES:
        raise ExperimentError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}")
    composed = _Composed(experiment, _workers(experiment, workers))
    folder = RunFolder.create(out, experiment.name)
    folder.write("experiment.toml", experiment.toml())
    folder.write("env.json", _environment(composed))
    return composed.run(folder, start(experiment.strategy, experiment.selector, composed.initial), display(progress))


def resume(
    path: str | Path, *, rounds: int | None = None, experiment: Experiment | None = None, progress: str = "auto"
) -> Run:
    """Go on with an interrupted run, to the same bits as if it had not been; ``rounds`` makes it longer.

    ``experiment`` is needed only if the run was made from Python objects that a file cannot name.
    """
    folder = RunFolder.open(Path(path))
    text = (folder.path / "experiment.toml").read_text(encoding="utf-8")
    if experiment is None:
        if text.startswith(UNNAMED):
            raise RunError(
                f"{folder.path} was made from Python objects ({text.splitlines()[0].removeprefix(UNNAMED).strip()}); "
                f"resume it from Python with shoal.resume(path, experiment=...)"
            )
        experiment = Experiment.from_file(folder.path / "experiment.toml")
    if rounds is not None:
        experiment = replace(experiment, rounds=rounds)
        folder.write("experiment.toml", experiment.toml())
    recorded = folder.read("env.json")
    composed = _Composed(experiment, int(recorded["workers"]))
    point = folder.latest() or start(experiment.strategy, experiment.selector, composed.initial)
    difference = composed.initial.layout.difference(point.layout)
    if difference is not None:
        raise RunError(f"the checkpoint in {folder.path} is of another model ({difference}); use the model of that run")
    if point.round == experiment.rounds:
        raise RunError(f"{folder.path} has all its {point.round} rounds; give rounds=N to make it longer")
    if recorded["versions"] != _versions():
        folder.log("resumed under other versions: bits may differ", versions=_versions())
    folder.rewind(point.round if point.round else -1)
    folder.log("resumed", round=point.round)
    return composed.run(folder, point, display(progress))


class _Composed:
    """The parts of one run, checked against each other before anything is written."""

    def __init__(self, experiment: Experiment, workers: int) -> None:
        data = experiment.data.split(experiment.seed) if isinstance(experiment.data, Dataset) else experiment.data
        if experiment.cohort > len(data.clients):
            raise ExperimentError(
                f"cohort is {experiment.cohort}, but there are only {len(data.clients)} clients; "
                f"lower cohort or split the data among more clients"
            )
        self.experiment, self.data, self.workers = experiment, data, workers
        self.make_model = experiment.make_model(data)
        module = build_module(self.make_model, experiment.seed, experiment.dtype)
        self.net = Net(module, experiment.device)
        self.initial = parameters_of(module).map(Tensor.cpu)
        self._check_data()
        if experiment.evaluation.clients_every and not any(
            data.shard(client).held_out is not None for client in data.clients[:100]
        ):
            raise ExperimentError(
                "evaluation.clients_every is set, but clients hold no test examples; set data.client_test = 0.2"
            )

    def _check_data(self) -> None:
        """One forward pass, and every label in range: better here than as a traceback from a client."""
        first = self.data.shard(self.data.clients[0])
        with torch.no_grad():
            try:
                output = self.net.module.eval()(self._cast(first.x[:2]).to(self.net.flat.device))
            except RuntimeError as error:
                raise ExperimentError(
                    f"the model does not accept examples of shape {list(first.x.shape[1:])}: {error}"
                ) from error
        if loss_named(self.experiment.local.loss) is not cross_entropy:
            return
        if isinstance(self.data, ArrayData):
            _check_labels(self.data.y, output.shape[1], "the training data")
        if self.data.test is not None:
            _check_labels(self.data.test.y, output.shape[1], "the test data")

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.net.dtype) if x.is_floating_point() else x

    def run(self, folder: RunFolder, point: Checkpoint, show: Display) -> Run:
        """Run to the end or to an interrupt; the summary says which."""
        experiment, began = self.experiment, time.perf_counter()
        fleet = None
        try:
            show.starting(folder.path, experiment, len(self.data.clients), self.initial.layout, self.engine)
            fleet = SimulatedFleet(self._assignment(), self.workers)
            coordinator = Coordinator(
                self._plan(), experiment.strategy, experiment.selector, fleet, point, self._evaluate(), [folder, show]
            )
            folder.write("summary.json", {"status": "running", "name": experiment.name})
            status = "failed"
            with _interruptible(coordinator, show):
                point = coordinator.run()
            status = "finished" if point.round == experiment.rounds else "interrupted"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if fleet is not None:
                fleet.close()
                summary = summarise(folder, experiment.target) | {
                    "status": status,
                    "name": experiment.name,
                    "wall_seconds": time.perf_counter() - began,
                }
                folder.write("summary.json", summary)
            folder.close()
            show.close()
        show.finished(Run(folder.path))
        return Run(folder.path)

    @property
    def engine(self) -> str:
        return f"lean × {self.workers} workers" if self.workers else "lean, in this process"

    def _plan(self) -> Plan:
        e = self.experiment
        return Plan(
            e.rounds, e.cohort, e.seed, e.quorum, e.over_select, e.deadline,
            e.evaluation.every, e.evaluation.clients_every, e.checkpoint_every,
        )  # fmt: skip

    def _assignment(self) -> Assignment:
        e = self.experiment
        return Assignment(self.make_model, self.data, e.strategy, e.local, e.seed, e.dtype, e.device, e.client)

    def _evaluate(self) -> Any:
        test = self.data.test
        if test is None:
            return None
        device = self.net.flat.device
        shard = Shard(self._cast(test.x).to(device), test.y.to(device))

        def on_test_set(parameters: Parameters[Tensor]) -> dict[str, float]:
            self.net.load(parameters.trainable, parameters.buffers, parameters.counters)
            return evaluate(self.net, self.experiment.local, shard)

        return on_test_set


def _check_labels(y: Tensor, outputs: int, where: str) -> None:
    if y.dtype.is_floating_point:
        raise DataError(f"{where} has labels of {y.dtype}, cross-entropy needs class numbers; set local.loss = 'mse'")
    wrong = ((y < 0) | (y >= outputs)).nonzero()
    if len(wrong):
        row = tuple(wrong[0].tolist())
        raise DataError(
            f"label {int(y[row])} in row {row[0]} of {where} is out of range for a model with {outputs} outputs; "
            f"labels must be 0 to {outputs - 1}: set model.classes or correct the labels"
        )


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


def _environment(composed: _Composed) -> dict[str, Any]:
    return {
        "engine": "lean",
        "workers": composed.workers,
        "versions": _versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "population": len(composed.data.clients),
        "parameters": composed.initial.layout.size(Segment.TRAINABLE),
        "layout": composed.initial.layout.hash,
    }
