"""The lean trainer: one client at a time on a resident net, at the cost of its forward and backward passes.

The parameters are reset in place in the flat buffer, batches come from tensors in memory, gradients go
straight into one fused update. It runs any model, and is the reference that every other engine must equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor, nn

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named
from shoal.client.net import Net
from shoal.client.optimizers import clip_, optimizer_for
from shoal.protos.parameters import Segment
from shoal.strategies.base import Drift, Update, drift_at

__all__ = ["LeanTrainer", "Turn", "batches", "declared_batches"]


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
    passes = limit or (local.epochs if epochs is None else epochs)
    return islice(batches(turn.shard, local.batch_size, passes, turn.rng, local.drop_last), limit)


@dataclass(frozen=True)
class Turn:
    """One client's training in one round: its examples, a random stream of its own, the round's learning rate."""

    client: str
    round: int
    shard: Shard
    rng: np.random.Generator
    lr: float


class LeanTrainer:
    """Trains one client ``[P]``; see :class:`shoal.strategies.base.Trainer`."""

    def __init__(self, net: Net, local: LocalTraining, turn: Turn) -> None:
        self._net, self._local, self._turn = net, local, turn
        self._loss = loss_named(local.loss)
        self._first: tuple[Tensor | None, Tensor | None] | None = None

    def run(self, start: Tensor, *, drift: Drift | None = None, epochs: int | None = None) -> Update:
        net, local = self._net, self._local
        _in_training(net.module)
        self._begin()
        net.flat.copy_(start)
        plain = local.optimizer == "sgd" and not (local.momentum or local.weight_decay or local.clip)
        step = self._step_plain if plain else self._stepper()
        sizes, losses = list[int](), list[Tensor]()
        for x, y in declared_batches(local, self._turn, epochs):
            loss = self._loss(net.module(net.arrange(x)), y)
            step(_gradients(loss, net.weights), drift)
            losses.append(loss.detach())
            sizes.append(len(x))
        steps = len(sizes)
        return self._update(start, steps, steps * self._turn.lr, {"loss": _weighted_mean(losses, sizes)})

    def _begin(self) -> None:
        """A strategy may train twice: each time from the round's buffers and counters."""
        if self._first is None:
            self._first = self._net.read(Segment.BUFFERS), self._net.read(Segment.COUNTERS)
        else:
            self._net.restore(*self._first)

    def _update(self, start: Tensor, steps: int, lr_sum: float, metrics: Mapping[str, float]) -> Update:
        """What the net holds now, as seen from ``start``."""
        net = self._net
        buffers, counters = net.read(Segment.BUFFERS), net.read(Segment.COUNTERS)
        examples = float(len(self._turn.shard))
        return Update(net.flat - start, examples, steps, lr_sum, {}, buffers, counters, metrics)

    def _step_plain(self, gradients: tuple[Tensor, ...], drift: Drift | None) -> None:
        """w ← w − lr (g + drift), without gathering g into one vector."""
        net = self._net
        if drift is not None:
            net.flat.add_(drift_at(drift, net.flat), alpha=-self._turn.lr)
        torch._foreach_add_(net.views, gradients, alpha=-self._turn.lr)

    def _stepper(self) -> Callable[[tuple[Tensor, ...], Drift | None], None]:
        net, clip, taken = self._net, self._local.clip, count()
        optimizer = optimizer_for(self._local, net.flat)

        def step(gradients: tuple[Tensor, ...], drift: Drift | None) -> None:
            with torch.no_grad():
                g = _joined(gradients)
                if drift is not None:
                    g.add_(drift_at(drift, net.flat))
                if clip is not None:
                    clip_(g, clip)
                optimizer.step(net.flat, g, self._turn.lr, next(taken))

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
        net.flat.copy_(at)
        total = torch.zeros_like(at) if backward else torch.zeros((), dtype=at.dtype)
        for x, y in zip(torch.split(shard.x, 1024), torch.split(shard.y, 1024), strict=True):
            with torch.set_grad_enabled(backward):
                loss = self._loss(net.module(net.arrange(x.clone())), y)
            if backward:
                total += _joined(_gradients(loss, net.weights)) * (len(x) / len(shard))
            else:
                total += loss.detach() * (len(x) / len(shard))
        net.restore(buffers, counters)
        return total


def _in_training(module: nn.Module) -> None:
    if not module.training:  # walking all submodules costs as much as a small step
        module.train()


def _gradients(loss: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a batch; zeros for a parameter that the loss does not reach."""
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    if any(gradient is None for gradient in found):
        return tuple(torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))
    return found


def _joined(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _weighted_mean(values: list[Tensor], weights: list[int]) -> float:
    """One transfer from the device for a whole run, in float64."""
    numbers: list[float] = torch.stack(values).tolist()
    return float(sum(map(operator.mul, numbers, weights)) / sum(weights))
