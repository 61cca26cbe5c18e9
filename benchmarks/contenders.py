"""The contenders that live in Shoal's own environment; each is a function of a task that gives back the weights.

``plain`` is examples/plain_fedavg.py. ``shoal-ENGINE-N`` is in :mod:`benchmarks.engines`, ``flwr`` in
:mod:`benchmarks.flower`, ``floor`` in :mod:`benchmarks.floor`; each imports no more than it needs, since the time to
the first round counts from the start of the process.

Run in a process of its own by :mod:`benchmarks.measure`: ``python -m benchmarks.contenders NAME TASK OUT``.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.nets import loaded, weights_of
from benchmarks.tasks import Task

__all__ = ["PLAIN", "Tensors", "contend", "plain"]

ROOT = Path(__file__).resolve().parents[1]
PLAIN = runpy.run_path(str(ROOT / "examples" / "plain_fedavg.py"), run_name="plain_fedavg")


class Tensors(Mapping[str, tuple[Tensor, Tensor]]):
    """Every registered client's examples by its name, as views of the task's arrays."""

    def __init__(self, task: Task) -> None:
        self._x, self._y = torch.from_numpy(task.x), torch.from_numpy(task.y)
        self._starts, self._clients = task.starts.tolist(), task.registered

    def __getitem__(self, client: str) -> tuple[Tensor, Tensor]:
        shard = int(client) % (len(self._starts) - 1)
        rows = slice(self._starts[shard], self._starts[shard + 1])
        return self._x[rows], self._y[rows]

    def __len__(self) -> int:
        return self._clients

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self._clients))


def plain(task: Task) -> np.ndarray:
    names = [[str(client) for client in cohort] for cohort in task.cohorts]
    rows = [dict(zip(n, map(torch.from_numpy, o), strict=True)) for n, o in zip(names, task.orders, strict=True)]

    def orders(round: int, client: str) -> list[Tensor]:
        if client == names[round - 1][0]:
            task.lap()
        return [rows[round - 1][client]]

    model = loaded(task.net, task.initial)
    PLAIN["fedavg"](model, Tensors(task), names, orders, task.lr, task.batch)
    return weights_of(model)


def contend(name: str, task: Task, out: Path) -> None:
    """Run one contender and write down its answer."""
    torch.set_num_threads(1)
    if name == "plain":
        task.finish(out, plain(task))
    elif name == "flwr":
        from benchmarks.flower import flower

        task.finish(out, flower(task))
    elif name == "floor":
        from benchmarks.floor import floor

        task.finish(out, None, **floor(task))
    else:
        from benchmarks.engines import engine

        engine(name, task, out)


if __name__ == "__main__":
    from benchmarks import contenders  # by its name, so that workers and actors import it too

    contenders.contend(sys.argv[1], Task(Path(sys.argv[2])), Path(sys.argv[3]))
