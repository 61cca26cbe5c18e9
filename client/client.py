"""Training in a way that cannot be declared: subclass :class:`Client` and write your own ``fit``.

Every strategy works with it: what a strategy adds to the gradient (FedProx's pull, SCAFFOLD's correction) is applied by
:meth:`Work.step`, or by :meth:`Work.correct` in a hand-written loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net
from shoal.client.trainer import LeanTrainer, batches
from shoal.protos.errors import InvalidUpdate
from shoal.protos.parameters import Segment
from shoal.strategies.base import Drift, Update

__all__ = ["Client", "FitTrainer", "Task", "Work"]


@dataclass(frozen=True)
class Task:
    """Who trains, and when."""

    client: str
    round: int


class Work:
    """What ``fit`` gets: the model with the sent parameters, this client's data, and a random stream of its own."""

    def __init__(self, net: Net, data: Shard, task: Task, local: LocalTraining, epochs: int, rng: np.random.Generator):
        self.model: nn.Module = net.module
        self.data, self.task, self.local, self.epochs, self.rng = data, task, local, epochs, rng
        self.steps, self.lr_sum = 0, 0.0
        self.drift: Drift | None = None
        self._net = net

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that declared training would see."""
        return batches(self.data, self.local.batch_size, self.epochs, self.rng, self.local.drop_last)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step: zero the gradients, backward, the strategy's correction, step."""
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.correct(optimizer.param_groups[0]["lr"])
        optimizer.step()

    def correct(self, lr: float) -> None:
        """Call once per optimizer step, between ``backward()`` and ``step()``: adds what the strategy asks for."""
        self.steps, self.lr_sum = self.steps + 1, self.lr_sum + lr
        if self.drift is None:
            return
        drift = self.drift(self._net.flat) if callable(self.drift) else self.drift
        for weight, part in zip(self._net.weights, self._net.split(drift), strict=True):
            weight.grad = part.clone() if weight.grad is None else weight.grad.add_(part)


class Client(ABC):
    """A participant with its own training loop. One object serves all clients of a process: keep no state on it."""

    @abstractmethod
    def fit(self, work: Work) -> Mapping[str, float] | None:
        """Train ``work.model`` in place on ``work.data``; return metrics of your own, or None."""


class FitTrainer(LeanTrainer):
    """Runs a :class:`Client`'s ``fit`` where a strategy asks for training."""

    def __init__(
        self,
        client: Client,
        task: Task,
        net: Net,
        local: LocalTraining,
        shard: Shard,
        rng: np.random.Generator,
        lr: float,
    ) -> None:
        super().__init__(net, local, shard, rng, lr)
        self._client, self._task = client, task

    def run(self, start: Tensor, *, drift: Drift | None = None, epochs: int | None = None) -> Update:
        net, shard = self._net, self._shard
        work = Work(net, shard, self._task, self._local, self._local.epochs if epochs is None else epochs, self._rng)
        work.drift = drift
        net.module.train()
        net.flat.copy_(start)
        metrics = self._client.fit(work)
        if drift is not None and not work.steps:
            raise InvalidUpdate(
                f"fit of client {self._task.client!r} made no corrected step, but the strategy corrects gradients; "
                f"use work.step(loss, optimizer), or work.correct(lr) between backward() and step()"
            )
        return Update(
            net.flat - start,
            float(len(shard)),
            work.steps,
            work.lr_sum,
            buffers=net.read(Segment.BUFFERS),
            counters=net.read(Segment.COUNTERS),
            metrics={name: float(value) for name, value in (metrics or {}).items()},
        )
