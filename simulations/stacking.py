"""One client's recorded step becomes the step of K clients: every tensor of a client's own gains a leading axis.

Most operations have a rule (:mod:`shoal.simulations.rules`), which costs one call for all clients. What has none runs
under ``torch.vmap``: correct, though slower. The number of clients is not built in, so one program serves all blocks.

With ``fuse`` the program trains: each weight's gradient goes into the weight as soon as nothing else reads it, and a
gradient that is a matrix product is accumulated by that product itself, so no gradient is ever written to memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from shoal.simulations.fusing import Descent, descents
from shoal.simulations.mapping import Mapped
from shoal.simulations.rules import apply_rule
from shoal.simulations.step import Step, live, memory, written

__all__ = ["Stacking", "stack"]

aten = torch.ops.aten


def for_each(value: Tensor, x: Tensor) -> Tensor:
    """A copy for each client."""
    return value.expand(len(x), *value.shape).clone(memory_format=torch.contiguous_format)


def stack(step: Step, *, fuse: bool) -> Callable[..., Any]:
    """The step as a function of stacked weights, buffers, counters, x, y and draws, in the order of the graph's inputs.

    It returns the clients' losses ``[K]`` and, unless fused, a gradient for each weight that has one. A fused one takes
    ``rate`` (minus the learning rate) as its first argument and changes the weights instead.
    """
    return Stacking(step).program(fuse).forward


class Stacking:
    """Goes once through the recorded graph and writes the stacked one."""

    def __init__(self, step: Step) -> None:
        self.step, self.graph, self.root = step, fx.Graph(), torch.nn.Module()
        self.made: dict[fx.Node, fx.Node] = {}
        self.shared = set(step.constants)  # nodes that are the same for all clients
        self.changed = {memory(target) for node in step.graph.nodes for target in written(node)}

    def program(self, fuse: bool) -> fx.GraphModule:
        step = self.step
        rate = self.graph.placeholder("rate") if fuse else None
        for node in step.inputs:
            self.made[node] = self.graph.placeholder(str(node.target))
        for node, constant in step.constants.items():
            setattr(self.root, node.name, constant)
            self.made[node] = self.graph.get_attr(node.name)
        due = descents(step) if fuse else {}
        gradients = [] if fuse else [g for g in step.gradients if g is not None]
        reads = [node for found in due.values() for descent in found for node in descent.reads]
        needed = live(step.graph, [step.loss, *gradients, *reads])
        for node in step.graph.nodes:
            if node.op == "call_function" and node in needed:
                self.made[node] = self._call(node)
            for descent in due.get(node, ()):
                self._descend(descent, rate)
        self.graph.output(tuple(self.made[node] for node in (step.loss, *gradients)))
        return fx.GraphModule(self.root, self.graph)

    def _descend(self, descent: Descent, rate: Any) -> None:
        weight = self.made[descent.weight]
        for addend in descent.addends:
            at = self.call(aten.transpose.int, weight, 1, 2) if addend.turned else weight
            sides = [self.made[side] for side in addend.sides]
            if len(sides) == 2 and all(map(self.stacked, addend.sides)):
                # The transpose of a product of what is transposed: so that what is written is a row of the block.
                a, b = sides if not addend.turned else (self._t(sides[1]), self._t(sides[0]))
                self.graph.call_method("baddbmm_", (weight, a, b), {"alpha": rate})
            elif len(sides) == 2:
                self.graph.call_method("add_", (at, self.call(torch.matmul, *sides)), {"alpha": rate})
            else:
                self.graph.call_method("add_", (at, *sides), {"alpha": rate})

    def _t(self, side: fx.Node) -> fx.Node:
        return self.call(aten.transpose.int, side, 1, 2)

    def _call(self, node: fx.Node) -> fx.Node:
        inputs = [n for n in node.all_input_nodes if n not in self.shared]
        if not inputs:
            once = self.graph.node_copy(node, self.made.__getitem__)
            if memory(node) in self.changed:  # a client's own: what is written may be
                return self.call(for_each, once, self.made[self.step.x])
            self.shared.add(node)
            return once
        if node.target is operator.getitem:
            return self.graph.node_copy(node, self.made.__getitem__)
        done = apply_rule(self, node)
        return self._mapped(node) if done is None else done

    # What rules are written with.

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def stacked(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node not in self.shared

    def now(self, value: Any) -> Any:
        """The stacked form of an argument of the recorded graph."""
        return fx.node.map_arg(value, self.made.__getitem__)

    def _mapped(self, node: Any) -> fx.Node:
        mapped = Mapped(node.target, node.args, node.kwargs, [n for n in node.all_input_nodes if self.stacked(n)])

        def each(*tensors: Tensor) -> Any:
            return mapped(*tensors)

        each.__name__ = f"each_{node.name}"
        return self.call(each, *map(self.made.__getitem__, mapped.nodes))
