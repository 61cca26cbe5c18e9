"""The lean trainer: one client at a time on a resident net, at the cost of its forward and backward passes.

The parameters are reset in place in the flat buffer, batches come from tensors in memory, gradients go
straight into one fused update. It runs any model, and is the reference that every other engine must equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor, nn

from shoal.client.batch import NetBatch, NetSlope, joined
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named
from shoal.client.net import Net
from shoal.client.optimizers import clip_, optimizer_for
from shoal.protos import seeds
from shoal.protos.errors import InvalidUpdate
from shoal.protos.parameters import Layout, Segment
from shoal.strategies.base import Drift, Gradient, Loss, Update, drift_at
from shoal.strategies.sums import Carried

__all__ = ["LeanTrainer", "Turn", "batches", "declared_batches", "turn_of"]


def batches(
    shard: Shard, size: int, epochs: int, rng: np.random.Generator, drop_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """``epochs`` passes in batches of ``size`` (0: all at once), each pass in a new order.

    Batches are copies: what a model does to its input in place must not reach the data.
    """
    for _ in range(epochs):
        if size == 0 or size >= len(shard):
            yield shard.x.clone(), shard.y.clone()
            continue
        order = torch.from_numpy(rng.permutation(len(shard)))
        if drop_last:
            order = order[: len(order) // size * size]
        labels = torch.split(shard.y.index_select(0, order), size)
        for rows, y in zip(torch.split(order, size), labels, strict=True):
            yield shard.x.index_select(0, rows), y  # a batch at a time: it is still in the cache when it is used


def declared_batches(local: LocalTraining, turn: Turn, epochs: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``epochs``, or where that is None of the declared epochs or steps."""
    limit = local.steps if epochs is None else None
    # Each pass yields at least one batch, so as many passes as steps are always enough.
    passes = limit or epochs or turn.epochs or local.epochs
    return islice(batches(turn.shard, local.batch_size, passes, turn.rng, local.drop_last), limit)


Gradients = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Turn:
    """One client's training in one round: its examples, a random stream of its own, the round's learning rate.

    ``epochs`` are its own, where it does less than declared.
    """

    client: str
    round: int
    shard: Shard
    rng: np.random.Generator
    lr: float
    epochs: int | None = None


def turn_of(
    local: LocalTraining, seed: int, client: str, round: int, shard: Shard, rng: np.random.Generator | None = None
) -> Turn:
    """A client's turn in a round of the run with this seed; ``rng`` is its stream, where that is there already."""
    epochs, lr = None, local.lr * local.lr_decay ** (round - 1)
    if local.stragglers:
        fate = seeds.stream(seed, "work", round, client)
        epochs = int(fate.integers(1, local.epochs)) if fate.random() < local.stragglers else None
    rng = seeds.stream(seed, "batches", round, client) if rng is None else rng
    return Turn(client, round, shard, rng, lr, epochs)


class LeanTrainer:
    """Trains one client ``[P]``; see :class:`shoal.strategies.base.Trainer`.

    Each run begins from the ``carried`` buffers and counters. ``part`` is the client's row, where it is of a block.
    """

    def __init__(
        self, net: Net, local: LocalTraining, turn: Turn, carried: Carried, part: int | EllipsisType = ...
    ) -> None:
        self._net, self._local, self._turn, self._carried = net, local, turn, carried
        self._loss, self._labels = loss_named(local.loss), turn.shard.y
        self.lr, self.part = turn.lr, part

    @property
    def layout(self) -> Layout:
        return self._net.layout

    def run(
        self,
        start: Tensor,
        *,
        drift: Drift | None = None,
        gradient: Gradient | None = None,
        loss: Loss | None = None,
        mask: Tensor | None = None,
        epochs: int | None = None,
    ) -> Update:
        net, local = self._net, self._local
        self._begin(start)
        plain = local.optimizer == "sgd" and not (local.momentum or local.weight_decay or local.clip)
        step = self._plain_stepper(drift) if plain else self._stepper(drift, mask)
        sizes, losses = list[int](), list[Tensor]()
        for x, y in declared_batches(local, self._turn, epochs):
            if gradient is None:
                batch = self._batch(net.arrange(x), y)
                value = batch.value(loss)
                step(batch.gradients(value))
            else:
                value, direction = self._made(gradient, NetSlope(self._batch(net.arrange(x), y), loss))
                step(net.split(direction))
            if mask is not None:
                torch.where(mask, net.flat, start, out=net.flat)
            losses.append(value.detach())
            sizes.append(len(x))
        steps = len(sizes)
        return self._update(start, steps, steps * self.lr, {"loss": _weighted_mean(losses, sizes)})

    def _batch(self, x: Tensor, y: Tensor) -> NetBatch:
        return NetBatch(self._net, self._loss, x, y, self._labels, self.part)

    def _begin(self, start: Tensor) -> None:
        net = self._net
        _in_training(net.module)
        net.restore(self._carried.buffers, self._carried.counters)
        net.flat.copy_(start)

    def _made(self, gradient: Gradient, slope: NetSlope) -> tuple[Tensor, Tensor]:
        """A strategy's own gradient of a batch, and the loss where it asked first."""
        now = self._net.flat.clone()
        direction = gradient(slope, now)
        self._net.flat.copy_(now)
        if slope.first is None:
            raise InvalidUpdate("the strategy makes a gradient without looking at the batch")
        return slope.first, direction

    def _update(self, start: Tensor, steps: int, lr_sum: float, metrics: Mapping[str, float]) -> Update:
        """What the net holds now, as seen from ``start``."""
        net = self._net
        buffers, counters = net.read(Segment.BUFFERS), net.read(Segment.COUNTERS)
        examples = float(len(self._turn.shard))
        return Update(net.flat - start, examples, steps, lr_sum, {}, buffers, counters, metrics)

    def _plain_stepper(self, drift: Drift | None) -> Callable[[Gradients], None]:
        """w ← w − lr (g + drift), without gathering g into one vector."""
        net, lr = self._net, self.lr

        def step(gradients: Gradients) -> None:
            if drift is not None:
                net.flat.add_(drift_at(drift, net.flat), alpha=-lr)
            torch._foreach_add_(net.views, gradients, alpha=-lr)

        return step

    def _stepper(self, drift: Drift | None, mask: Tensor | None) -> Callable[[Gradients], None]:
        net, clip, taken = self._net, self._local.clip, count()
        optimizer = optimizer_for(self._local, net.flat)

        def step(gradients: Gradients) -> None:
            with torch.no_grad():
                g = joined(gradients)
                if drift is not None:
                    g.add_(drift_at(drift, net.flat))
                if clip is not None:
                    clip_(g if mask is None else g.mul_(mask), clip)
                optimizer.step(net.flat, g, self.lr, next(taken))

        return step

    def loss(self, at: Tensor) -> Tensor:
        return self._whole(at, backward=False)

    def gradient(self, at: Tensor) -> Tensor:
        return self._whole(at, backward=True)

    def _whole(self, at: Tensor, backward: bool) -> Tensor:
        """Over the whole shard in chunks; the statistics that a forward pass moves are put back."""
        net, shard = self._net, self._turn.shard
        buffers, counters = net.read(Segment.BUFFERS), net.read(Segment.COUNTERS)
        _in_training(net.module)
        net.restore(self._carried.buffers, self._carried.counters)
        net.flat.copy_(at)
        total = torch.zeros_like(at) if backward else at.new_zeros(())
        for x, y in zip(torch.split(shard.x, 1024), torch.split(shard.y, 1024), strict=True):
            batch = self._batch(net.arrange(x.clone()), y)
            with torch.set_grad_enabled(backward):
                loss = batch.value(None)
            if backward:
                total += joined(batch.gradients(loss)) * (len(x) / len(shard))
            else:
                total += loss.detach() * (len(x) / len(shard))
        net.restore(buffers, counters)
        return total


def _in_training(module: nn.Module) -> None:
    if not module.training:  # walking all submodules costs as much as a small step
        module.train()


def _weighted_mean(values: list[Tensor], weights: list[int]) -> float:
    """One transfer from the device for a whole run, in float64."""
    numbers: list[float] = torch.stack(values).tolist()
    return float(sum(map(operator.mul, numbers, weights)) / sum(weights))
