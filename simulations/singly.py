"""Clients of a block one after the other, where stacking would gain nothing or is not possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net
from shoal.client.trainer import LeanTrainer, Turn
from shoal.strategies.base import Update
from shoal.strategies.sums import Carried

__all__ = ["each", "stacked"]

T = TypeVar("T")


def each(
    net: Net,
    local: LocalTraining,
    turns: Sequence[Turn],
    generators: Sequence[torch.Generator],
    carried: Carried,
    at: Tensor,
    function: Callable[[LeanTrainer, Tensor], T],
) -> list[T]:
    """What a function gives of each client's lean trainer and its row of ``at``, ``[P]`` or ``[K, P]``.

    Random masks come from the clients' own generators; ``carried`` may have a row for each.
    """
    count, results = len(turns), list[T]()
    rows, buffers = (vectors.expand(count, vectors.shape[-1]) for vectors in (at, carried.buffers))
    for k, (turn, generator) in enumerate(zip(turns, generators, strict=True)):
        own = Carried(buffers[k], carried.counters)
        net.restore(own.buffers, own.counters)
        trainer = LeanTrainer(net, local, replace(turn, shard=_placed(turn.shard, net.flat)), own, k)
        with _drawing_from(generator), torch.enable_grad():
            results.append(function(trainer, rows[k]))
    return results


def stacked(updates: Sequence[Update], like: Tensor) -> Update:
    """The updates of several clients as that of a block."""

    def column(name: str) -> Tensor:
        values = [float(getattr(update, name)) for update in updates]
        return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)

    def rows(vectors: Sequence[Tensor | None]) -> Tensor | None:
        return None if vectors[0] is None else torch.stack([v for v in vectors if v is not None])

    losses = [update.metrics["loss"] for update in updates]
    metrics: Any = {"loss": torch.tensor(losses, dtype=torch.float64, device=like.device)}
    examples, steps, lr_sum = map(column, ("examples", "steps", "lr_sum"))
    return Update(
        torch.stack([update.delta for update in updates]),
        *(examples, steps, lr_sum),
        {},
        rows([update.buffers for update in updates]),
        rows([update.counters for update in updates]),
        metrics,
    )


def _placed(shard: Shard, like: Tensor) -> Shard:
    x = shard.x
    return Shard(x.to(like) if x.is_floating_point() else x.to(like.device), shard.y.to(like.device))


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """PyTorch's own generator is this one."""
    own = (
        torch.default_generator
        if generator.device.type == "cpu"
        else torch.cuda.default_generators[generator.device.index]
    )
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)
