"""A recorded step: a graph of ATen operations, and what these do to memory.

The node of a tensor knows in its ``meta`` the ``shape``, ``stride`` and ``dtype``, and as ``memory`` the node that made
the memory it lies in, so that views and what is changed in place are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from shoal.protos.errors import ExperimentError

__all__ = ["Draw", "Step", "Unsuitable", "live", "memory", "views", "written"]

aten = torch.ops.aten


class Unsuitable(ExperimentError):
    """This model or training cannot be stacked; the message says why."""


@dataclass(frozen=True)
class Draw:
    """A random mask (dropout): ones with probability ``p``, laid out as one client's tensor."""

    node: fx.Node
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    p: float


@dataclass(frozen=True)
class Step:
    """The recorded step of one client."""

    graph: fx.Graph
    weights: Sequence[fx.Node]
    buffers: Sequence[fx.Node]
    counters: Sequence[fx.Node]
    x: fx.Node
    y: fx.Node
    draws: Sequence[Draw]
    constants: dict[fx.Node, Tensor]
    loss: fx.Node
    gradients: Sequence[fx.Node | None]  # None where the loss does not reach a weight

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """Weights, buffers, counters, x, y and draws."""
        draws = [draw.node for draw in self.draws]
        return [*self.weights, *self.buffers, *self.counters, self.x, self.y, *draws]

    def same_as(self, other: Step) -> bool:
        """Whether another recording did the same: a model whose code branches does not."""
        return self._told() == other._told() and all(map(_same, self.constants.values(), other.constants.values()))

    def masks(self) -> list[tuple[object, ...]]:
        """How the random masks are drawn."""
        return [(draw.shape, draw.stride, draw.dtype, draw.p) for draw in self.draws]

    def _told(self) -> list[object]:
        return [f"{node.op} {node.target} {node.args} {node.kwargs}" for node in self.graph.nodes] + [self.masks()]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)


def memory(node: fx.Node) -> fx.Node:
    """The node that made the memory in which this one's tensor lies."""
    made: fx.Node = node.meta.get("memory", node)
    return made


def views(node: fx.Node) -> bool:
    """Whether the result lies in the memory of the first argument."""
    return isinstance(node.target, OpOverload) and any(r.alias_info for r in node.target._schema.returns)


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that the operation changes."""
    op = node.target
    if not isinstance(op, OpOverload):
        return []
    if op is aten.native_batch_norm.default:  # whose schema does not say so
        return [running for running in node.args[3:5] if isinstance(running, fx.Node) and node.args[5]]
    if not op._schema.is_mutable:
        return []
    given = [
        node.kwargs.get(argument.name) if i >= len(node.args) else node.args[i]
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(given) if isinstance(leaf, fx.Node)]


def live(graph: fx.Graph, results: Iterable[fx.Node]) -> set[fx.Node]:
    """The operations that these results need, and those that write into a tensor."""
    needed = set(results) | {node for node in graph.nodes if written(node)}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed
