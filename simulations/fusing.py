"""Gradients that go straight into their weights, found in the recorded step.

A dense layer's weight gradient is a matrix product. Accumulated by the product itself it is never written to memory
and read again, which for small batches costs as much as the product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from shoal.simulations.capture import Step, live, views

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

    That is as soon as all parts of its gradient are known and nothing that follows reads the weight or a view of it.
    """
    pairs = zip(step.weights, step.gradients, strict=True)
    found = [Descent(w, _addends(g, w.meta["shape"])) for w, g in pairs if g is not None]
    needed = live(step.graph, [step.loss, *(node for descent in found for node in descent.reads)])
    nodes, due = list(step.graph.nodes), dict[fx.Node, list[Descent]]()
    at = {node: i for i, node in enumerate(nodes)}
    for descent in found:
        last = max(at[node] for node in [*descent.reads, *_readers(descent.weight, needed)])
        due.setdefault(nodes[last], []).append(descent)
    return due


def _addends(gradient: fx.Node, shape: tuple[int, ...], turned: bool = False) -> list[Addend]:
    """Taken apart along transposes and sums as far as these lead to matrix products."""
    sides = [side for side in gradient.args if isinstance(side, fx.Node)]
    if gradient.target is aten.t.default:
        return _addends(sides[0], shape, not turned)
    if gradient.target is aten.mm.default:
        return [Addend(sides, turned)]
    whole = shape[::-1] if turned else shape
    if gradient.target is aten.add.Tensor and [side.meta["shape"] for side in sides] == [whole, whole]:
        return [addend for side in sides for addend in _addends(side, shape, turned)]
    return [Addend([gradient], turned)]


def _readers(weight: fx.Node, needed: Collection[fx.Node]) -> Iterable[fx.Node]:
    """The operations that read a tensor, itself or through a view."""
    for user in weight.users:
        if user in needed:
            yield user
            if views(user):
                yield from _readers(user, needed)
