"""A block of clients beside the lean trainer, which must give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal import LocalTraining
from shoal.client.data import Shard
from shoal.client.net import Net, build_module, parameters_of
from shoal.client.trainer import LeanTrainer, Turn
from shoal.protos import seeds
from shoal.simulations.block import BlockTrainer, Programs
from shoal.strategies.base import Update
from shoal.strategies.sums import Carried

LENGTHS = [8, 8, 4]


def _compare(
    make: Callable[[], nn.Module],
    shape: Sequence[int] = (6,),
    loss: Any = "cross-entropy",
    y: Callable[[int, torch.Generator], Tensor] | None = None,
    *,
    fuse: bool,
    tokens: bool = False,
    dtype: str = "float64",
) -> None:
    """Train three clients with examples of a ``shape``, or with ``tokens`` below 9, by both trainers."""
    local, generator = LocalTraining(batch_size=4, loss=loss), torch.Generator().manual_seed(1)
    shards = [Shard(_examples(n, shape, tokens, generator, dtype), _labels(n, y, generator)) for n in LENGTHS]

    def turns() -> list[Turn]:
        return [Turn(str(k), 3, s, seeds.stream(0, "batches", 3, str(k)), 0.1) for k, s in enumerate(shards)]

    net = Net(build_module(make, 0, dtype))
    values = parameters_of(net.module)
    carried, start, lean = Carried(values.buffers, values.counters), net.flat.clone(), []
    for turn in turns():
        torch.manual_seed(seeds.integer(0, "torch", 3, turn.client))
        lean.append(LeanTrainer(net, local, turn, carried).run(start))
    programs = Programs(Net(build_module(make, 0, dtype)), local, fuse=fuse)
    _check(BlockTrainer(programs, turns(), 0, carried).run(start), lean, dtype)


def _examples(n: int, shape: Sequence[int], tokens: bool, generator: torch.Generator, dtype: str) -> Tensor:
    if tokens:
        return torch.randint(0, 9, (n, *shape), generator=generator)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


def _labels(n: int, y: Callable[[int, torch.Generator], Tensor] | None, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 3, (n,), generator=generator) if y is None else y(n, generator)


def _check(block: Update, lean: Sequence[Update], dtype: str) -> None:
    numbers: Any = block.metrics
    close: Any = {"rtol": 1e-10, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-6}
    for k, one in enumerate(lean):
        torch.testing.assert_close(block.delta[k], one.delta, **close)
        assert one.delta.abs().max() > 0
        assert float(numbers["loss"][k]) == pytest.approx(one.metrics["loss"], abs=100 * close["atol"])
        for stacked, single in ((block.buffers, one.buffers), (block.counters, one.counters)):
            if single is not None:
                assert stacked is not None
                torch.testing.assert_close(stacked[k], single, **close)


@pytest.fixture
def compare() -> Callable[..., None]:
    return _compare
