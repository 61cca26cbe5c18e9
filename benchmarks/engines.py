"""Shoal's engines as contenders: ``shoal-ENGINE-N`` is ``Experiment.simulate(engine=ENGINE, workers=N)``.

Shoal draws cohorts and orders itself: that it ends where the others end shows that they were the same.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import Tensors
from benchmarks.nets import NETS
from benchmarks.tasks import SEED, Task
from shoal import Experiment, LocalTraining
from shoal.client.data import Shard
from shoal.protos.errors import ExperimentError
from shoal.simulations.federated import ArrayData, FederatedData, LazyData, Numbered
from shoal.strategies.selectors import Selector, Uniform

__all__ = ["engine", "simulated"]


class Timed(Selector):
    """Draws as :class:`Uniform` does, and takes the time: to draw is the first thing in a round."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def select(self, *given: Any) -> Sequence[str]:
        self._task.lap()
        return Uniform().select(*given)


class MadeOnDemand:
    """What :class:`LazyData` calls; no closure, so that its tensors are shared among workers."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __call__(self, client: str) -> Shard:
        return Shard(*self._tensors[client])


def engine(name: str, task: Task, out: Path) -> None:
    """Run it and write down its answer; that Shoal refuses the experiment is an answer too."""
    _, kind, workers = name.split("-")
    try:
        weights, used = simulated(task, kind, int(workers))
        task.finish(out, weights, engine=used)
    except ExperimentError as error:
        task.finish(out, None, refused=str(error))


def simulated(task: Task, engine: str, workers: int) -> tuple[np.ndarray, str]:
    """The weights, and the engine that was used in the end."""
    local = LocalTraining(lr=task.lr, batch_size=task.batch, epochs=1)
    settings: Any = {"rounds": task.rounds, "cohort": task.cohort, "seed": SEED, "selector": Timed(task)}
    experiment = Experiment(model=NETS[task.net], data=_federated(task), local=local, **settings)
    with tempfile.TemporaryDirectory() as folder:
        run = experiment.simulate(engine=engine, workers=workers, out=folder, progress="none")
        used = json.loads((run.path / "env.json").read_text()).get("engine", engine)
        return np.asarray(run.parameters.trainable.numpy()), str(used)


def _federated(task: Task) -> FederatedData:
    classes = int(task.y.max()) + 1
    if task.lazy:
        make = MadeOnDemand(Tensors(task))
        return LazyData(Numbered(task.registered), make, classes=classes, shape=task.shape)
    starts = task.starts.tolist()
    offsets = {str(i): (start, stop, stop) for i, (start, stop) in enumerate(pairwise(starts))}
    return ArrayData(torch.from_numpy(task.x), torch.from_numpy(task.y), offsets, classes=classes)
