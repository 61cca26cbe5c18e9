"""The examples of a block of clients, and the orders in which they see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from shoal.client.data import Shard
from shoal.client.local import LocalTraining

__all__ = ["Examples", "Orders"]


@dataclass(frozen=True)
class Orders:
    """One pass: each client's rows ``[K, n]`` in the order it sees them, of which the first ``lengths[k]`` count."""

    rows: Tensor
    lengths: Sequence[int]


class Examples:
    """The shards of a block as rows of two tensors: of those they are slices of, where there are such, or of copies."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._sizes = [len(shard) for shard in shards]
        xs, ys = [shard.x for shard in shards], [shard.y for shard in shards]
        x, y = _common(xs), _common(ys)
        if x is not None and y is not None and x[1] == y[1]:
            (self._x, first), (self._y, _) = x, y
        else:
            self._x, self._y, first = torch.cat(xs), torch.cat(ys), [0, *accumulate(self._sizes[:-1])]
        self._first = np.array(first)[:, None]
        self._memory: dict[int, Tensor] = {}

    def orders(self, streams: Sequence[np.random.Generator], local: LocalTraining, going: Sequence[bool]) -> Orders:
        """As :func:`shoal.client.trainer.batches` draws them; those who are not ``going`` on draw nothing more."""
        size, lengths = local.batch_size, list(self._sizes)
        rows = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
        for k, (n, stream) in enumerate(zip(self._sizes, streams, strict=True)):
            if not going[k]:
                lengths[k] = 0
                continue
            whole = size == 0 or size >= n
            rows[k, :n] = np.arange(n) if whole else stream.permutation(n)
            lengths[k] = n // size * size if local.drop_last and not whole else n
        return Orders(torch.from_numpy(rows + self._first), lengths)

    def take(self, rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The examples of rows ``[k, b]``, until the next are taken, on the device of the weights ``like`` these.

        Features that are no whole numbers get their dtype. They are copies in memory that is used again: fresh memory
        costs more than the copy.
        """
        x, y = (self._gathered(i, whole, rows) for i, whole in enumerate((self._x, self._y)))
        return x.to(like) if x.is_floating_point() else x.to(like.device), y.to(like.device)

    def _gathered(self, which: int, whole: Tensor, rows: Tensor) -> Tensor:
        shape = rows.numel(), *whole.shape[1:]
        if which not in self._memory or self._memory[which].shape != shape:
            self._memory[which] = whole.new_empty(shape)
        flat = rows.reshape(-1).to(whole.device)
        return torch.index_select(whole, 0, flat, out=self._memory[which]).view(*rows.shape, *shape[1:])


def _common(parts: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """The tensor that all parts are slices of, and where in it each begins; None if there is none."""
    one = parts[0]
    row, memory = one.stride(0), one.untyped_storage().data_ptr()
    offsets = [part.storage_offset() for part in parts]
    low = min(offsets)
    for part, offset in zip(parts, offsets, strict=True):
        alike = part.shape[1:] == one.shape[1:] and part.stride() == one.stride() and part.dtype == one.dtype
        together = part.untyped_storage().data_ptr() == memory and (offset - low) % max(row, 1) == 0
        if not (alike and together and part.is_contiguous()):
            return None
    first = [(offset - low) // max(row, 1) for offset in offsets]
    rows = max(start + len(part) for start, part in zip(first, parts, strict=True))
    return one.as_strided((rows, *one.shape[1:]), one.stride(), low), first
