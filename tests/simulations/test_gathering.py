"""The rows of a block are those of its shards, however these lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal import LocalTraining
from shoal.client.data import Shard
from shoal.protos import seeds
from shoal.simulations.gathering import Examples

X = torch.arange(120.0).view(20, 2, 3)
Y = torch.arange(20)


def halves(x: Tensor, y: Tensor) -> list[Shard]:
    return [Shard(x[:7], y[:7]), Shard(x[9:12], y[9:12]), Shard(x[12:], y[12:])]


def wide() -> Tensor:
    """One row, as a slice of a matrix whose rows are longer."""
    return torch.arange(240.0).view(20, 12).as_strided((1, 2, 3), (12, 3, 1), 24)


SHARDS: dict[str, Callable[[], list[Shard]]] = {
    "slices": lambda: halves(X, Y),
    "slices in another order": lambda: halves(X, Y)[::-1],
    "overlapping slices": lambda: [Shard(X[:7], Y[:7]), Shard(X[3:9], Y[3:9])],
    "slices of different rows": lambda: [Shard(X[:7], Y[1:8]), Shard(X[9:12], Y[9:12])],
    "copies": lambda: [Shard(s.x.clone(), s.y.clone()) for s in halves(X, Y)],
    "copies of the labels": lambda: [Shard(s.x, s.y.clone()) for s in halves(X, Y)],
    "every other row": lambda: [Shard(X[::2], Y[::2]), Shard(X[1::2], Y[1::2])],
    "transposed": lambda: halves(X.transpose(1, 2), Y),
    "expanded": lambda: [Shard(X[k : k + 1].expand(3, 2, 3), Y[k : k + 1].expand(3)) for k in (2, 5)],
    "one row": lambda: [Shard(X[k : k + 1], Y[k : k + 1]) for k in (3, 9, 4)],
    "one row of a wider matrix": lambda: [Shard(wide(), Y[:1]), Shard(X[5:8], Y[5:8])],
    "starting within a row": lambda: [Shard(X.flatten()[k : k + 18].view(3, 2, 3), Y[:3]) for k in (0, 3)],
    "token ids": lambda: halves(X.long(), Y),
    "numbers as labels": lambda: halves(X, Y.float().unsqueeze(1)),
}


@pytest.mark.parametrize("batch_size", [2, 0])
@pytest.mark.parametrize("name", SHARDS)
def test_rows_are_taken_in_each_clients_order(name: str, batch_size: int) -> None:
    shards, local = SHARDS[name](), LocalTraining(batch_size=batch_size)
    examples = Examples(shards)
    orders = examples.orders([seeds.stream(0, "b", k) for k in range(len(shards))], local, [True] * len(shards))
    x, y = examples.take(orders.rows, torch.zeros(1, dtype=torch.float64))

    assert list(orders.lengths) == [len(shard) for shard in shards]
    for k, shard in enumerate(shards):
        n, stream = len(shard), seeds.stream(0, "b", k)
        whole = batch_size == 0 or batch_size >= n
        order = torch.arange(n) if whole else torch.from_numpy(stream.permutation(n))
        assert torch.equal(x[k, :n].to(shard.x.dtype), shard.x[order]) and torch.equal(y[k, :n], shard.y[order])
    assert x.dtype == (torch.float64 if shards[0].x.is_floating_point() else shards[0].x.dtype)
