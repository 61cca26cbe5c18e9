"""K clients' copies of a net's weights, buffers and counters, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.client.net import Net
from shoal.strategies.sums import Carried

__all__ = ["Memory", "Replicas"]


class Memory:
    """The memory of a block's weights, used again for the next block: what is warm costs a tenth of what is not.

    ``fused`` weights lie tensor by tensor, each ``[K, size]``, so that one product can change a tensor of all clients.
    Else they lie client by client, ``[K, P]``, as an optimizer takes them.
    """

    def __init__(self, net: Net, *, fused: bool) -> None:
        self.net, self.fused = net, fused
        self.sizes = [shape.numel() for shape in net.shapes[0]]
        self._made: dict[int, list[Tensor]] = {}

    def lend(self, count: int) -> list[Tensor]:
        """The weights of so many clients, one matrix for each tensor or one for all; undefined at first."""
        most = max(self._made, default=0)
        if count > most:
            sizes = self.sizes if self.fused else [sum(self.sizes)]
            self._made = {count: [self.net.flat.new_empty(count, size) for size in sizes]}
            most = count
        return [matrix[:count] for matrix in self._made[most]]


class Replicas:
    """All clients begin with weights ``start``, ``[P]`` or ``[K, P]``, and carried buffers, ``[B]`` or ``[K, B]``."""

    def __init__(self, memory: Memory, start: Tensor, carried: Carried, count: int) -> None:
        def each(vector: Tensor) -> Tensor | None:
            if not vector.shape[-1]:
                return None
            return vector.to(start.device).expand(count, -1).clone(memory_format=torch.contiguous_format)

        self._net, self._sizes, self._fused = memory.net, memory.sizes, memory.fused
        self._start, self._count = start, count
        self.buffers, self.counters = each(carried.buffers), each(carried.counters)
        self._matrices = memory.lend(count)
        for matrix, column in zip(self._matrices, self._columns(start), strict=True):
            matrix.copy_(column)
        self._views: dict[tuple[int, int], list[Tensor]] = {}

    def _columns(self, vectors: Tensor) -> Sequence[Tensor]:
        """The parts ``[..., size]`` of vectors ``[..., P]`` that belong to the matrices."""
        return torch.split(vectors, [matrix.shape[1] for matrix in self._matrices], dim=-1)

    def inputs(self, part: slice) -> list[Tensor]:
        """The tensors of some neighbours, with a leading axis, as a stacked program takes them."""
        key = part.start, part.stop
        if key not in self._views:
            weights, buffers, counters = self._net.shapes
            matrices = [matrix[part] for matrix in self._matrices]
            views = _shaped(matrices if self._fused else _split(matrices[0], weights), weights)
            for vectors, shapes in ((self.buffers, buffers), (self.counters, counters)):
                if vectors is not None:
                    views += _shaped(_split(vectors[part], shapes), shapes)
            self._views[key] = views
        return self._views[key]

    def inputs_at(self, vectors: Tensor, part: slice) -> list[Tensor]:
        """The same with other weights, ``[P]`` or ``[k, P]``."""
        vectors = vectors.expand(part.stop - part.start, vectors.shape[-1])
        if not self._fused and vectors.data_ptr() == self._matrices[0][part].data_ptr():
            return self.inputs(part)
        weights = self._net.shapes[0]
        return [*_shaped(_split(vectors.contiguous(), weights), weights), *self.inputs(part)[len(weights) :]]

    @property
    def weights(self) -> Tensor:
        """As vectors ``[K, P]``: the memory itself where it lies so, else a copy."""
        return torch.cat(self._matrices, dim=1) if self._fused else self._matrices[0]

    def add(self, vectors: Tensor, by: float, part: slice) -> None:
        """Add ``by`` times vectors ``[P]`` or ``[k, P]`` to the weights of some neighbours."""
        for matrix, column in zip(self._matrices, self._columns(vectors), strict=True):
            matrix[part].add_(column, alpha=by)

    def hold(self, mask: Tensor, part: slice) -> None:
        """Put weights back to where they began, except those of the ``mask`` ``[P]``."""
        columns = zip(self._matrices, self._columns(mask), self._columns(self._start), strict=True)
        for matrix, moving, start in columns:
            at = matrix[part]
            torch.where(moving, at, start[part] if start.dim() > 1 else start, out=at)

    def moved(self) -> Tensor:
        """How far each client has come, ``[K, P]``, in new memory."""
        delta = self._start.new_empty(self._count, self._start.shape[-1])
        for column, matrix, start in zip(self._columns(delta), self._matrices, self._columns(self._start), strict=True):
            torch.sub(matrix, start, out=column)
        return delta

    def joined(self, gradients: Sequence[Tensor], reached: Sequence[bool], part: slice) -> Tensor:
        """The gradients of a move as vectors ``[k, P]``; zeros for a weight that the loss does not reach."""
        k, found = part.stop - part.start, iter(gradients)
        rows = [
            next(found).reshape(k, -1) if has else self._start.new_zeros(k, size)
            for has, size in zip(reached, self._sizes, strict=True)
        ]
        return torch.cat(rows, dim=1)


def _split(vectors: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
    return torch.split(vectors, [shape.numel() for shape in shapes], dim=1)


def _shaped(columns: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    return [column.view(len(column), *shape) for column, shape in zip(columns, shapes, strict=True)]
