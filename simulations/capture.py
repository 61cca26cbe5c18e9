"""One client's training step as a list of ATen operations, recorded while the lean engine's own code runs.

What is recorded is what autograd does: forward, backward, and what a model writes into its buffers. Nothing is traced
symbolically, so a step costs milliseconds to record; :mod:`shoal.simulations.stacking` turns it into one for many
clients at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.client.losses import Loss
from shoal.client.net import Net
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Segment

__all__ = ["Draw", "Step", "Unsuitable", "live", "record", "views", "writes"]

aten = torch.ops.aten


class Unsuitable(ExperimentError):
    """This model or training cannot be stacked; the message says why."""


@dataclass(frozen=True)
class Draw:
    """A random mask (dropout): ones with probability ``p``, in the ``shape`` of one client's tensor."""

    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    p: float


@dataclass(frozen=True)
class Step:
    """The recorded step of one client; each node knows its ``meta["shape"]``."""

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
        return _told(self) == _told(other) and all(
            torch.equal(a, b) for a, b in zip(self.constants.values(), other.constants.values(), strict=True)
        )


def record(net: Net, loss: Loss, x: Tensor, y: Tensor) -> Step:
    """Record one step on a batch, twice; :class:`Unsuitable` for what cannot be replayed. The net is left as it was."""
    buffers, counters = net.read(Segment.BUFFERS), net.read(Segment.COUNTERS)
    training = net.module.training
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            net.module.train()
            first, again = (_Recorder(net).run(loss, x.clone(), y.clone()) for _ in range(2))
    finally:
        net.module.train(training)
        net.restore(buffers, counters)
    if not first.same_as(again):
        raise Unsuitable("the model does not do the same in each step")
    if net.arrange(x) is not x and any(len(draw.shape) == 4 for draw in first.draws):
        raise Unsuitable("it drops out of images, whose masks the lean engine draws with their channels last")
    return first


@dataclass
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches all operations between the inputs and the gradients; tensors are known by identity."""

    net: Net
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # an id is a tensor's own only while it lives
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else PyTorch imports its compiler, which takes two seconds, only to keep it off this class."""
        return False

    def run(self, loss: Loss, x: Tensor, y: Tensor) -> Step:
        net = self.net
        weights = [self._input(f"w{i}", w) for i, w in enumerate(net.weights)]
        buffers = [self._input(f"b{i}", b) for i, b in enumerate(net.tensors(Segment.BUFFERS))]
        counters = [self._input(f"c{i}", c) for i, c in enumerate(net.tensors(Segment.COUNTERS))]
        inputs = self._input("x", x), self._input("y", y)
        with self:
            value = loss(net.module(x), y)
            found = torch.autograd.grad(value, net.weights, allow_unused=True)
        gradients = [None if g is None else self._node(g) for g in found]
        self.graph.output((self._node(value), *(g for g in gradients if g is not None)))
        loss_node = self.nodes[id(value)]
        return Step(self.graph, weights, buffers, counters, *inputs, self.draws, self.constants, loss_node, gradients)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op is aten.detach.default:  # of no effect outside autograd
            self._bind(out, self._node(args[0]))
            return out
        if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
            raise Unsuitable(f"the model looks at values while it runs ({op})")
        if torch.Tag.nondeterministic_seeded in op.tags and not _without_dropout(op, args, kwargs or {}):
            self._drawn(op, args, out)
            return out
        if op._schema.is_mutable:
            self._refuse_foreign(op, args)
        node = self.graph.call_function(op, _mapped(args, self._node), _mapped(kwargs or {}, self._node))
        if isinstance(out, Tensor):
            self._bind(out, node)
        else:
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._bind(part, self.graph.call_function(operator.getitem, (node, i)))
        return out

    def _input(self, name: str, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        self._bind(tensor, node)
        return node

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def _node(self, tensor: Tensor) -> fx.Node:
        """The tensor's node; a tensor that nobody made here is a constant of the model."""
        if id(tensor) not in self.nodes:
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.graph.placeholder(f"k{len(self.constants)}")
            self.constants[node] = tensor.detach()
            self._bind(tensor, node)
        return self.nodes[id(tensor)]

    def _drawn(self, op: OpOverload, args: Any, out: Tensor) -> None:
        if op is not aten.bernoulli_.float or len(args) < 2 or not out.is_contiguous():
            raise Unsuitable(f"the model draws random numbers with {op}; only dropout can be repeated client by client")
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"d{len(self.draws)}")
        self._bind(out, node)
        self.draws.append(Draw(node, tuple(out.shape), out.dtype, float(args[1])))

    def _refuse_foreign(self, op: OpOverload, args: Any) -> None:
        """A write into what is not the client's own would reach the next client."""
        for given, argument in zip(args, op._schema.arguments, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given, Tensor) and self._node(given) in self.constants:
                raise Unsuitable("the model changes a tensor that is not part of its state")


def live(graph: fx.Graph, results: Iterable[fx.Node]) -> set[fx.Node]:
    """The operations that these results need, and those that write into a tensor."""
    needed = set(results) | {node for node in graph.nodes if writes(node)}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def views(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument."""
    return isinstance(node.target, OpOverload) and any(r.alias_info for r in node.target._schema.returns)


def _without_dropout(op: OpOverload, args: Any, kwargs: Any) -> bool:
    """Attention, which is marked as random, but is so only with dropout."""
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    names = {argument.name for argument in op._schema.arguments}
    return "dropout_p" in names and not given.get("dropout_p", 0.0)


def writes(node: fx.Node) -> bool:
    """Whether the operation changes an argument."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _mapped(value: Any, node: Callable[[Tensor], fx.Node]) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: node(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _told(step: Step) -> list[str]:
    return [f"{node.op} {node.target} {node.args} {node.kwargs}" for node in step.graph.nodes]
