"""The block trainer: K clients at a time, each step one stacked program for all of them.

Neighbours whose batches are of one size take a step together, on views of the block; those who have finished drop out,
and nothing is padded. So clients should stand in the order of their numbers of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named
from shoal.client.net import Net
from shoal.client.optimizers import clip_, optimizer_for
from shoal.client.trainer import LeanTrainer, Turn
from shoal.protos import seeds
from shoal.protos.errors import InvalidUpdate
from shoal.protos.parameters import Layout
from shoal.simulations.capture import record
from shoal.simulations.gathering import Examples
from shoal.simulations.replicas import Memory, Replicas
from shoal.simulations.singly import each, stacked
from shoal.simulations.stacking import stack
from shoal.simulations.step import Draw, Unsuitable
from shoal.strategies.base import Drift, Gradient, Loss, Update
from shoal.strategies.sums import Carried

__all__ = ["BlockTrainer", "Move", "Programs", "moves"]

T = TypeVar("T")


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
        self.memory = {fused: Memory(net, fused=fused) for fused in (False, True)}
        self._made: dict[Any, Program] = {}

    def get(self, x: Tensor, y: Tensor, fuse: bool) -> Program:
        """For batches ``[K, b, ...]``; :class:`~shoal.simulations.capture.Unsuitable` if there can be none."""
        key = x.shape[1:], x.dtype, y.shape[1:], y.dtype, fuse
        if key not in self._made:
            step = record(self.net, loss_named(self.local.loss), x, y)
            reached = [gradient is not None for gradient in step.gradients]
            self._made[key] = Program(stack(step, fuse=fuse), step.draws, reached)
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
        self.lr = turns[0].lr

    @property
    def layout(self) -> Layout:
        return self._net.layout

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        """Seeded as the lean engine seeds PyTorch's own."""
        device, seed = self._net.flat.device, self._seed
        keys = [seeds.integer(seed, "torch", turn.round, turn.client) for turn in self._turns]
        return [torch.Generator(device).manual_seed(key) for key in keys]

    @torch.no_grad()
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
        if loss is not None:  # in which it may do what cannot be stacked
            alone = partial(LeanTrainer.run, gradient=gradient, loss=loss, mask=mask, epochs=epochs)
            return stacked(self._each(start, partial(_drifting, drift, alone)), start)
        local, count = self._local, len(self._turns)
        fuse = self._programs.fuse and gradient is None
        replicas = Replicas(self._programs.memory[fuse], start, self._carried, count)
        step = self._fused(replicas, drift) if fuse else self._stepper(replicas, drift, gradient, mask)
        limit = local.steps if epochs is None else None
        passes = [limit or epochs or turn.epochs or local.epochs for turn in self._turns]
        taken, seen = [0] * count, [0] * count
        losses = torch.zeros(count, dtype=torch.float64, device=start.device)
        for done in range(max(passes)):
            going = [done < most and steps != limit for most, steps in zip(passes, taken, strict=True)]
            if not any(going):
                break
            orders = self._examples.orders([turn.rng for turn in self._turns], local, going)
            for move in moves(orders.lengths, local.batch_size or max(orders.lengths), taken, limit):
                losses[move.part].add_(step(move, orders.rows[move.part, move.rows]), alpha=move.size)
                seen[move.part] = [n + move.size for n in seen[move.part]]
                if mask is not None:
                    replicas.hold(mask, move.part)
        return self._update(replicas, start, taken, losses / torch.tensor(seen, device=start.device))

    def _update(self, replicas: Replicas, start: Tensor, taken: Sequence[int], losses: Tensor) -> Update:
        def column(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=start.dtype, device=start.device).unsqueeze(1)

        examples = column([len(turn.shard) for turn in self._turns])
        rates = column([turn.lr * steps for turn, steps in zip(self._turns, taken, strict=True)])
        metrics: Any = {"loss": losses}  # [K]: the engine makes numbers of it
        delta, buffers, counters = replicas.moved(), replicas.buffers, replicas.counters
        return Update(delta, examples, column(taken), rates, {}, buffers, counters, metrics)

    def _fused(self, replicas: Replicas, drift: Drift | None) -> Callable[[Move, Tensor], Tensor]:
        """Makes one step of some neighbours on these rows; their losses ``[k]``. L2 decay of plain SGD is a drift."""
        decay, lr = self._local.weight_decay, self.lr

        def step(move: Move, rows: Tensor) -> Tensor:
            x, y = self._examples.take(rows, self._net.flat)
            correction = _drift_of(drift, replicas, move.part)
            if decay:
                pull = replicas.weights[move.part] * decay
                correction = pull if correction is None else pull.add_(correction)
            program = self._programs.get(x, y, True)
            (loss,) = program.step(-lr, *replicas.inputs(move.part), x, y, *self._masks(program, move.part))
            if correction is not None:
                replicas.add(correction, -lr, move.part)
            return loss  # type: ignore[no-any-return]

        return step

    def _stepper(
        self, replicas: Replicas, drift: Drift | None, gradient: Gradient | None, mask: Tensor | None
    ) -> Callable[[Move, Tensor], Tensor]:
        """The same with any optimizer, and with gradients of a strategy's own."""
        local, optimizer = self._local, optimizer_for(self._local, replicas.weights)

        def step(move: Move, rows: Tensor) -> Tensor:
            slope = BlockSlope(self, replicas, move, *self._examples.take(rows, self._net.flat))
            now = replicas.weights[move.part]
            g = slope(now) if gradient is None else gradient(slope, now.clone()).clone()  # it may keep both
            if (correction := _drift_of(drift, replicas, move.part)) is not None:
                g.add_(correction)
            if local.clip is not None:
                clip_(g if mask is None else g.mul_(mask), local.clip)
            optimizer.step(now, g, self.lr, move.taken, move.part)
            return slope.loss()

        return step

    def slope(self, at: Tensor, replicas: Replicas, part: slice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The losses ``[k]`` and gradients ``[k, P]`` of these batches at the parameters ``at``."""
        program = self._programs.get(x, y, False)
        loss, *found = program.step(*replicas.inputs_at(at, part), x, y, *self._masks(program, part))
        return loss, replicas.joined(found, program.reached, part)

    def _masks(self, program: Program, part: slice) -> list[Tensor]:
        return [self._mask(draw, part) for draw in program.draws]

    def _mask(self, draw: Draw, part: slice) -> Tensor:
        """Each client's from its own stream, as the lean engine would draw it."""
        shape, stride = (part.stop - part.start, *draw.shape), (math.prod(draw.shape), *draw.stride)
        masks = torch.empty_strided(shape, stride, dtype=draw.dtype, device=self._net.flat.device)
        for mask, generator in zip(masks, self._generators[part], strict=True):
            mask.bernoulli_(draw.p, generator=generator)
        return masks

    def loss(self, at: Tensor) -> Tensor:
        return torch.stack(self._each(at, LeanTrainer.loss)).unsqueeze(1)

    def gradient(self, at: Tensor) -> Tensor:
        return torch.stack(self._each(at, LeanTrainer.gradient))

    def _each(self, at: Tensor, function: Callable[[LeanTrainer, Tensor], T]) -> list[T]:
        """One by one: a whole shard is no small batch, stacking would gain nothing."""
        return each(self._net, self._local, self._turns, self._generators, self._carried, at, function)


class BlockSlope:
    """The gradient of some neighbours' batches at any parameters; see :class:`shoal.strategies.base.Slope`."""

    def __init__(self, trainer: BlockTrainer, replicas: Replicas, move: Move, x: Tensor, y: Tensor) -> None:
        self._trainer, self._replicas, self._x, self._y = trainer, replicas, x, y
        self.part, self.size = move.part, move.size
        self._first: Tensor | None = None

    def __call__(self, at: Tensor, rows: slice = slice(None)) -> Tensor:
        x, y = self._x[:, rows].clone(), self._y[:, rows].contiguous()  # a model may change its input in place
        loss, found = self._trainer.slope(at, self._replicas, self.part, x, y)
        self._first = loss if self._first is None else self._first
        return found

    def loss(self) -> Tensor:
        """Where it was asked for first, ``[k]``."""
        if self._first is None:
            raise InvalidUpdate("the strategy makes a gradient without looking at the batch")
        return self._first


def _drifting(drift: Drift | None, train: Callable[..., Update], trainer: LeanTrainer, start: Tensor) -> Update:
    """One client of a block, whose drift may be a row for each."""
    if callable(drift):
        raise Unsuitable("the strategy has both a loss of its own and a drift that changes")
    own = drift[trainer.part] if drift is not None and drift.dim() > 1 else drift
    return train(trainer, start, drift=own)


def _drift_of(drift: Drift | None, replicas: Replicas, part: slice) -> Tensor | None:
    at = drift(replicas.weights) if callable(drift) else drift
    return at[part] if at is not None and at.dim() > 1 else at
