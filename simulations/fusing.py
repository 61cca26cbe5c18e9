"""Gradients that go straight into their weights, found in the recorded step.

A dense layer's weight gradient is a matrix product. Accumulated by the product itself it is never written to memory
and read again, which for small batches costs as much as the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from shoal.simulations.step import Step, live, memory, written

__all__ = ["Addend", "Descent", "descents"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Addend:
    """A part of a gradient: a tensor, or the two ``sides`` of a matrix product; ``turned``: its transpose counts."""

    sides: Sequence[fx.Node]
    turned: bool


@dataclass(frozen=True)
class Descent:
    """A weight that goes down its gradient, the sum of ``addends``."""

    weight: fx.Node
    addends: Sequence[Addend]

    @property
    def reads(self) -> Iterable[fx.Node]:
        return (side for addend in self.addends for side in addend.sides)


def descents(step: Step) -> Mapping[fx.Node, Sequence[Descent]]:
    """After which recorded operation each weight descends.

    That is as soon as all parts of its gradient are there to stay and nothing that follows reads the weight.
    """
    nodes = list(step.graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    changed = {memory(target): at[node] for node in nodes for target in written(node)}
    parts = _Parts(at, changed | dict.fromkeys(step.weights, len(nodes)))
    pairs = zip(step.weights, step.gradients, strict=True)
    found = [Descent(w, parts.of(g, w.meta["shape"])) for w, g in pairs if g is not None]
    needed = live(step.graph, [step.loss, *(node for descent in found for node in descent.reads)])
    read = {memory(given): at[node] for node in nodes if node in needed for given in node.all_input_nodes}
    due = dict[fx.Node, list[Descent]]()
    for descent in found:
        there = [max(at[node], changed.get(memory(node), 0)) for node in descent.reads]
        due.setdefault(nodes[max(*there, read.get(descent.weight, 0))], []).append(descent)
    return due


@dataclass(frozen=True)
class _Parts:
    """``changed`` says after which position memory stays as it is."""

    at: Mapping[fx.Node, int]
    changed: Mapping[fx.Node, int]

    def of(self, gradient: fx.Node, shape: tuple[int, ...], turned: bool = False) -> list[Addend]:
        """Taken apart along transposes and sums as far as these lead to matrix products."""
        sides = [side for side in gradient.args if isinstance(side, fx.Node)]
        whole = shape[::-1] if turned else shape
        if not self._may_wait(gradient, sides):
            return [Addend([gradient], turned)]
        if gradient.target is aten.t.default:
            return self.of(sides[0], shape, not turned)
        if gradient.target is aten.mm.default:
            return [Addend(sides, turned)]
        if gradient.target is aten.add.Tensor and [side.meta["shape"] for side in sides] == [whole, whole]:
            return [addend for side in sides for addend in self.of(side, shape, turned)]
        return [Addend([gradient], turned)]

    def _may_wait(self, node: fx.Node, sides: Iterable[fx.Node]) -> bool:
        """Whether the operation gives the same when it is done later."""
        after = any(self.changed.get(memory(given), -1) > self.at[node] for given in (node, *sides))
        return not after and not node.kwargs
