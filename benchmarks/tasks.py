"""What every contender is given, as files, and what it gives back. Needs only numpy: peers have no Shoal.

All begin with the same weights, ask the same clients in the same rounds and give a client its examples in the same
order: everything random is drawn before anyone starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SEED", "Task", "write"]

SEED = 0


@dataclass(frozen=True)
class Task:
    """The work, read from ``folder``; rounds count from 1, as everywhere."""

    folder: Path
    laps: list[float] = field(default_factory=list)

    @cached_property
    def said(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "task.json").read_text()))

    @property
    def net(self) -> str:
        return str(self.said["net"])

    @property
    def lr(self) -> float:
        return float(self.said["lr"])

    @property
    def batch(self) -> int:
        return int(self.said["batch"])

    @property
    def rounds(self) -> int:
        return int(self.said["rounds"])

    @property
    def registered(self) -> int:
        """How many clients there are; those beyond :attr:`shards` hold what client ``number % shards`` holds."""
        return int(self.said["registered"])

    @property
    def lazy(self) -> bool:
        """Whether shards are to be made on demand."""
        return bool(self.said["lazy"])

    @property
    def cohort(self) -> int:
        return len(self.cohorts[0])

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def short(self) -> Task:
        """The first of its rounds alone, for contenders that are slow; the task itself where it is short."""
        return Task(self.folder / "short") if (self.folder / "short").exists() else self

    @cached_property
    def x(self) -> np.ndarray:
        return self._array("x")

    @cached_property
    def y(self) -> np.ndarray:
        return self._array("y")

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each shard begins among the examples; the last number is their end."""
        return self._array("starts")

    @cached_property
    def initial(self) -> np.ndarray:
        """The weights to begin with, in the order of the module's parameters."""
        return self._array("initial")

    @cached_property
    def cohorts(self) -> np.ndarray:
        """``[rounds, cohort]``: who is asked."""
        return self._array("cohorts")

    @cached_property
    def orders(self) -> list[list[np.ndarray]]:
        """``orders[round - 1][position]``: the order of the examples of the client at that position of the cohort."""
        flat, at, orders = self._array("orders"), 0, list[list[np.ndarray]]()
        for cohort in self.cohorts:
            orders.append([])
            for size in map(self.size, cohort):
                orders[-1].append(flat[at : at + size])
                at += size
        return orders

    def _array(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.folder / f"{name}.npy")
        return array

    def rows(self, client: int) -> slice:
        shard = int(client) % self.shards
        return slice(int(self.starts[shard]), int(self.starts[shard + 1]))

    def size(self, client: int) -> int:
        rows = self.rows(client)
        return int(rows.stop - rows.start)

    def shard(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows(client)
        return self.x[rows], self.y[rows]

    def asked(self, round: int) -> Iterator[tuple[int, np.ndarray]]:
        """The clients of a round, each with the order of its examples."""
        return zip(map(int, self.cohorts[round - 1]), self.orders[round - 1], strict=True)

    def lap(self) -> None:
        """A round starts now; the clock is the same in all processes of this machine."""
        self.laps.append(time.monotonic())

    def finish(self, out: Path, weights: np.ndarray | None, **more: Any) -> None:
        """Give back the weights, in the order of :attr:`initial`, and the times that were taken."""
        if weights is not None:
            np.save(out / "weights.npy", np.asarray(weights, np.float64))
        (out / "answer.json").write_text(json.dumps({"laps": self.laps, **more}))


def write(folder: Path, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray], short: int) -> Task:
    """Write what :class:`Task` reads; its first ``short`` rounds, if there are more, as a task of their own beside."""
    (folder / "task.json").write_text(json.dumps(dict(said)))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    task = Task(folder)
    if short < task.rounds:
        inner = folder / "short"
        inner.mkdir()
        (inner / "task.json").write_text(json.dumps({**said, "rounds": short}))
        np.save(inner / "cohorts.npy", task.cohorts[:short])
        np.save(inner / "orders.npy", np.concatenate([order for orders in task.orders[:short] for order in orders]))
        for name in arrays.keys() - {"cohorts", "orders"}:
            (inner / f"{name}.npy").symlink_to(folder / f"{name}.npy")
    return task
