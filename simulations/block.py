"""The block trainer: K clients at a time, each step one stacked program for all of them.

Neighbours whose batches are of one size take a step together, on views of the block; those who have finished drop out,
and nothing is padded. So clients should stand in the order of their numbers of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named
from shoal.client.net import Net
from shoal.client.optimizers import clip_, optimizer_for
from shoal.client.trainer import LeanTrainer, Turn
from shoal.protos import seeds
from shoal.simulations.capture import record
from shoal.simulations.gathering import Examples
from shoal.simulations.replicas import Memory, Replicas
from shoal.simulations.stacking import stack
from shoal.simulations.step import Draw
from shoal.strategies.base import Drift, Update
from shoal.strategies.sums import Carried

__all__ = ["BlockTrainer", "Move", "Programs", "moves"]


@dataclass(frozen=True)
class Program:
    """A stacked step for one shape of batches, and the random masks it wants."""

    step: Callable[..., Any]
    draws: Sequence[Draw]
    reached: Sequence[bool]  # for each weight, whether it has a gradient


class Programs:
    """The stacked steps of a net, made when a shape of batches is first seen."""

    def __init__(self, net: Net, local: LocalTraining, *, fuse: bool) -> None:
        self.net, self.local, self.fuse = net, local, fuse
        self.memory = Memory(net, fused=fuse)
        self._made: dict[Any, Program] = {}

    def get(self, x: Tensor, y: Tensor) -> Program:
        """For batches ``[K, b, ...]``; :class:`~shoal.simulations.capture.Unsuitable` if there can be none."""
        key = x.shape[1:], x.dtype, y.shape[1:], y.dtype
        if key not in self._made:
            step = record(self.net, loss_named(self.local.loss), x, y)
            self._made[key] = Program(
                stack(step, fuse=self.fuse), step.draws, [gradient is not None for gradient in step.gradients]
            )
        return self._made[key]


@dataclass(frozen=True)
class Move:
    """Neighbours, ``part`` of the block, step together: on ``rows`` of their orders, after ``taken`` steps each."""

    part: slice
    rows: slice
    taken: int

    @property
    def size(self) -> int:
        """Of each client's batch."""
        return int(self.rows.stop - self.rows.start)


def moves(lengths: Sequence[int], size: int, taken: list[int], limit: int | None) -> Iterator[Move]:
    """One pass over shards of these lengths in batches of ``size``, until each client has ``limit`` steps.

    ``taken`` counts each client's steps and is brought up to date.
    """
    for at in range(0, max(lengths), size):
        ends = [min(at + size, n) if taken[k] != limit else 0 for k, n in enumerate(lengths)]
        start = 0
        for (end, before), group in groupby(zip(ends, taken, strict=True)):
            stop = start + sum(1 for _ in group)
            if end > at:
                yield Move(slice(start, stop), slice(at, end), before)
                taken[start:stop] = [before + 1] * (stop - start)
            start = stop


class BlockTrainer:
    """Trains a block ``[K, P]``; see :class:`shoal.strategies.base.Trainer`.

    ``seed`` is the run's: random masks come from a stream of each client's own. All turns are of one round.
    """

    def __init__(self, programs: Programs, turns: Sequence[Turn], seed: int, carried: Carried) -> None:
        self._programs, self._net, self._local = programs, programs.net, programs.local
        self._turns, self._seed, self._carried = turns, seed, carried
        self._examples = Examples([turn.shard for turn in turns])

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        """Seeded as the lean engine seeds PyTorch's own."""
        device, seed = self._net.flat.device, self._seed
        keys = [seeds.integer(seed, "torch", turn.round, turn.client) for turn in self._turns]
        return [torch.Generator(device).manual_seed(key) for key in keys]

    @torch.no_grad()
    def run(self, start: Tensor, *, drift: Drift | None = None, epochs: int | None = None) -> Update:
        local, count = self._local, len(self._turns)
        replicas = Replicas(self._programs.memory, start, self._carried, count)
        step, limit = self._stepper(replicas, drift), local.steps if epochs is None else None
        passes = limit or (local.epochs if epochs is None else epochs)
        taken, seen = [0] * count, [0] * count
        losses = torch.zeros(count, dtype=torch.float64, device=start.device)
        for _ in range(passes):
            orders = self._examples.orders([turn.rng for turn in self._turns], local, taken, limit)
            for move in moves(orders.lengths, local.batch_size or max(orders.lengths), taken, limit):
                losses[move.part].add_(step(move, orders.rows[move.part, move.rows]), alpha=move.size)
                seen[move.part] = [n + move.size for n in seen[move.part]]
        return self._update(replicas, start, taken, losses / torch.tensor(seen, device=start.device))

    def _update(self, replicas: Replicas, start: Tensor, taken: Sequence[int], losses: Tensor) -> Update:
        def column(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=start.dtype, device=start.device).unsqueeze(1)

        examples = column([len(turn.shard) for turn in self._turns])
        rates = column([turn.lr * steps for turn, steps in zip(self._turns, taken, strict=True)])
        metrics: Any = {"loss": losses}  # [K]: the engine makes numbers of it
        delta, buffers, counters = replicas.moved(), replicas.buffers, replicas.counters
        return Update(delta, examples, column(taken), rates, {}, buffers, counters, metrics)

    def _stepper(self, replicas: Replicas, drift: Drift | None) -> Callable[[Move, Tensor], Tensor]:
        """Makes one step of some neighbours on these rows; their losses ``[k]``."""
        local, lr, programs = self._local, self._turns[0].lr, self._programs
        optimizer = None if programs.fuse else optimizer_for(local, replicas.weights)
        decay = local.weight_decay if programs.fuse else 0.0  # L2 decay of plain SGD is a drift

        def corrected(part: slice) -> Tensor | None:
            at = drift(replicas.weights) if callable(drift) else drift
            at = at[part] if at is not None and at.dim() > 1 else at
            if not decay:
                return at
            pull = replicas.weights[part] * decay
            return pull if at is None else pull.add_(at)

        def step(move: Move, rows: Tensor) -> Tensor:
            x, y = self._examples.take(rows, self._net.flat)
            program, inputs = programs.get(x, y), replicas.inputs(move.part)
            masks, correction = [self._mask(draw, move.part) for draw in program.draws], corrected(move.part)
            if optimizer is None:
                (loss,) = program.step(-lr, *inputs, x, y, *masks)
                if correction is not None:
                    replicas.add(correction, -lr, move.part)
                return loss  # type: ignore[no-any-return]
            loss, *gradients = program.step(*inputs, x, y, *masks)
            g = replicas.joined(gradients, program.reached, move.part)
            if correction is not None:
                g.add_(correction)
            if local.clip is not None:
                clip_(g, local.clip)
            optimizer.step(replicas.weights[move.part], g, lr, move.taken, move.part)
            return loss  # type: ignore[no-any-return]

        return step

    def _mask(self, draw: Draw, part: slice) -> Tensor:
        """Each client's from its own stream, as the lean engine would draw it."""
        shape, stride = (part.stop - part.start, *draw.shape), (math.prod(draw.shape), *draw.stride)
        masks = torch.empty_strided(shape, stride, dtype=draw.dtype, device=self._net.flat.device)
        for mask, generator in zip(masks, self._generators[part], strict=True):
            mask.bernoulli_(draw.p, generator=generator)
        return masks

    def loss(self, at: Tensor) -> Tensor:
        return self._each(at, LeanTrainer.loss).unsqueeze(1)

    def gradient(self, at: Tensor) -> Tensor:
        return self._each(at, LeanTrainer.gradient)

    def _each(self, at: Tensor, function: Callable[[LeanTrainer, Tensor], Tensor]) -> Tensor:
        """One client after the other: a whole shard is no small batch, stacking would gain nothing."""
        self._net.restore(self._carried.buffers, self._carried.counters)
        rows, results = at.expand(len(self._turns), at.shape[-1]), list[Tensor]()
        for turn, generator, row in zip(self._turns, self._generators, rows, strict=True):
            trainer = LeanTrainer(self._net, self._local, replace(turn, shard=self._placed(turn.shard)))
            with _drawing_from(generator):
                results.append(function(trainer, row))
        return torch.stack(results)

    def _placed(self, shard: Shard) -> Shard:
        x, like = shard.x, self._net.flat
        return Shard(x.to(like) if x.is_floating_point() else x.to(like.device), shard.y.to(like.device))


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """PyTorch's own generator is this one."""
    own = torch.default_generator if generator.device.type == "cpu" else torch.cuda.default_generators[0]
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)
