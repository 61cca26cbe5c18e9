"""One client's training step as a list of ATen operations, recorded while the lean engine's own code runs.

What is recorded is what autograd does: forward, backward, and what a model writes into its buffers. Nothing is traced
symbolically, so a step costs milliseconds to record; :mod:`shoal.simulations.stacking` turns it into one for many
clients at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shoal.client.losses import Loss
from shoal.client.net import Net
from shoal.protos.parameters import Segment
from shoal.simulations.step import Draw, Step, Unsuitable, memory, views, written
from shoal.simulations.watching import Readers, outside, random_state

__all__ = ["record"]

aten = torch.ops.aten


def record(net: Net, loss: Loss, x: Tensor, y: Tensor) -> Step:
    """Record one step on batches ``[K, b, ...]`` of some clients; :class:`Unsuitable` for what cannot be replayed.

    It is recorded again with other values, so that a model which treats these differently is found. The net is left as
    it was.
    """
    with _as_it_was(net):
        first = _Recorder(net).run(loss, x[0].clone(), y[0].clone())
        kept = outside(net.module)
        other = x[-1].flip(0) / 2 if x.is_floating_point() else x[-1].flip(0)
        again = _Recorder(net).run(loss, other, y[-1].flip(0))
        if kept != outside(net.module):
            raise Unsuitable("the model counts or draws in Python while it runs")
        if not first.same_as(again):
            raise Unsuitable("the model does not do the same in each step")
        if first.draws and _Recorder(net).run(loss, net.arrange(x[0].clone()), y[0].clone()).masks() != first.masks():
            raise Unsuitable("it drops out of images, whose masks the lean engine draws with their channels last")
    return first


@contextmanager
def _as_it_was(net: Net) -> Iterator[None]:
    """Set for training, as the lean engine does it, and put back. Not with oneDNN: its LSTM cannot be taken apart."""
    mkldnn: Any = torch.backends.mkldnn
    buffers, counters, enabled = net.read(Segment.BUFFERS), net.read(Segment.COUNTERS), mkldnn.enabled
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in net.module.modules()]
    try:
        mkldnn.enabled = False
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            if not net.module.training:
                net.module.train()
            yield
    finally:
        mkldnn.enabled = enabled
        for module, training in modes:
            module.training = training
        net.restore(buffers, counters)


@dataclass
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches all operations between the inputs and the gradients; tensors are known by identity."""

    net: Net
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # an id is a tensor's own only while it lives
    storages: set[int] = field(default_factory=set)  # of all tensors but the constants
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    dice: Tensor = field(init=False)  # the state of the random generator after the last draw

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else PyTorch imports its compiler, which takes two seconds, only to keep it off this class."""
        return False

    def run(self, loss: Loss, x: Tensor, y: Tensor) -> Step:
        net = self.net
        weights = [self._input(f"w{i}", weight, net.dtype) for i, weight in enumerate(net.weights)]
        buffers, counters = net.tensors(Segment.BUFFERS), net.tensors(Segment.COUNTERS)
        floats = [self._input(f"b{i}", buffer, net.dtype) for i, buffer in enumerate(buffers)]
        whole = [self._input(f"c{i}", counter, torch.int64) for i, counter in enumerate(counters)]
        inputs = self._input("x", x, x.dtype), self._input("y", y, y.dtype)
        held = {tensor: tensor.data_ptr() for tensor in (*net.weights, *buffers, *counters)}
        self.dice = random_state(x.device)
        with Readers(self._refuse_reader), self:
            value = loss(net.module(x), y)
            found = torch.autograd.grad(value, net.weights, allow_unused=True)
        if any(tensor.data_ptr() != address for tensor, address in held.items()):
            raise Unsuitable("the model gives a tensor of its state other memory (.data = …)")
        results = [None if tensor is None else self._result(tensor) for tensor in (value, *found)]
        now = [*net.tensors(Segment.BUFFERS), *net.tensors(Segment.COUNTERS)]
        self._keep(zip((*floats, *whole), (*buffers, *counters), now, strict=True))
        self.graph.output(tuple(node for node in results if node is not None))
        assert results[0] is not None
        return Step(self.graph, weights, floats, whole, *inputs, self.draws, self.constants, results[0], results[1:])

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in op.tags and not _without_dropout(op, args, kwargs):
            return self._draw(op, args, kwargs)
        if _looks(op, args):
            raise Unsuitable(f"the model looks at values while it runs ({op})")
        out = op(*args, **kwargs)
        if op is aten.detach.default:  # of no effect outside autograd
            self._bind(out, self._node(args[0]))
        elif any(argument.is_out for argument in op._schema.arguments):
            self._copy_out(op, args, kwargs)
        elif op is aten.lift_fresh.default:  # torch.tensor(…) in the model's code: made anew in each step
            self._call(aten.clone.default, (out.clone(),), {}, out)
        else:
            self._call(op, args, kwargs, out)
        return out

    def _call(self, op: OpOverload, args: Any, kwargs: Mapping[str, Any], out: Any) -> fx.Node:
        node = self.graph.call_function(op, tree_map(self._known, args), tree_map(self._known, dict(kwargs)))
        if any(memory(changed) in self.constants for changed in written(node)):
            raise Unsuitable("the model changes a tensor that is not part of its state")
        inside = memory(node.all_input_nodes[0]) if views(node) and node.all_input_nodes else None
        if isinstance(out, Tensor):
            self._bind(out, _described(node, out, inside))
        elif out is None and not written(node):
            raise Unsuitable(f"the model looks at values while it runs ({op})")
        else:
            for i, part in enumerate(out or ()):
                if isinstance(part, Tensor):
                    self._bind(part, _described(self.graph.call_function(operator.getitem, (node, i)), part, inside))
        return node

    def _copy_out(self, op: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> None:
        """``out=``: what the operation gives, copied."""
        functional = _functional(op)
        if functional is None or not isinstance(out := kwargs.get("out"), Tensor):
            raise Unsuitable(f"the model has its results written into several tensors ({op})")
        given = {name: value for name, value in kwargs.items() if name != "out"}
        if tuple(out.shape) != self._node(out).meta["shape"]:
            raise Unsuitable(f"the model has a tensor resized by out= ({op})")
        result = functional(*args, **given)
        self._call(functional, args, given, result)
        self._call(aten.copy_.default, (out, result), {}, out)

    def _input(self, name: str, tensor: Tensor, dtype: torch.dtype) -> fx.Node:
        """In a block it has this ``dtype``: a buffer of another one, such as a mask, is restored to its own."""
        node = used = _described(self.graph.placeholder(name), tensor)
        if tensor.dtype != dtype:
            cast = self.graph.call_function(aten._to_copy.default, (node,), {"dtype": tensor.dtype})
            used = _described(cast, tensor)
        self._bind(tensor, used)
        return node

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)
        if memory(node) not in self.constants:
            self.storages.add(tensor.untyped_storage()._cdata)

    def _known(self, value: Any) -> Any:
        return self._node(value) if isinstance(value, Tensor) else value

    def _node(self, tensor: Tensor) -> fx.Node:
        """The tensor's node; a tensor that nobody made here is a constant of the model."""
        if id(tensor) not in self.nodes:
            node = _described(self._before_all(f"k{len(self.constants)}"), tensor)
            if tensor.untyped_storage()._cdata in self.storages:
                raise Unsuitable("the model reaches a tensor by a way that cannot be followed")
            self.constants[node] = tensor.detach()
            self._bind(tensor, node)
        return self.nodes[id(tensor)]

    def _before_all(self, name: str) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            return self.graph.placeholder(name)

    def _draw(self, op: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """Dropout fills an empty tensor of its own, which becomes an input; its bits follow those of the last draw."""
        tensor: Any = args[0] if args and isinstance(args[0], Tensor) else None
        if op is not aten.bernoulli_.float or kwargs.get("generator") is not None or not self._alone(tensor):
            raise Unsuitable(f"the model draws random numbers with {op}; only dropout can be repeated client by client")
        if not torch.equal(self.dice, random_state(tensor.device)):
            raise Unsuitable("the model sets the state of the random generator")
        out: Tensor = op(*args)
        self.dice = random_state(tensor.device)
        node = _described(self._before_all(f"d{len(self.draws)}"), out)
        self._bind(out, node)
        p = float(args[1]) if len(args) > 1 else 0.5
        self.draws.append(Draw(node, tuple(out.shape), out.stride(), out.dtype, p))
        return out

    def _alone(self, tensor: Tensor | None) -> bool:
        """Whether an operation made this tensor's memory, and nothing else lies in it."""
        node = self.nodes.get(id(tensor))
        return (
            node is not None
            and node.op == "call_function"
            and [n for n in self.graph.nodes if memory(n) is node] == [node]
        )

    def _result(self, tensor: Tensor) -> fx.Node:
        """In memory of its own: weights change before a gradient that lies in one is read."""
        node = self._node(tensor)
        return self._copied(node, tensor) if memory(node).op == "placeholder" else node

    def _copied(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        return _described(self.graph.call_function(aten.clone.default, (node,)), tensor)

    def _keep(self, buffers: Iterable[tuple[fx.Node, Tensor, Tensor]]) -> None:
        """Copy back what was bound to a buffer's name anew, or changed in the buffer's own dtype."""
        changed = {memory(target) for node in self.graph.nodes for target in written(node)}
        copies = list[tuple[fx.Node, fx.Node]]()
        for buffer, before, now in buffers:
            node = self._node(now)
            if now.shape != before.shape:
                raise Unsuitable("the model changes the shape of a buffer")
            if now is not before or (memory(node) is not buffer and memory(node) in changed):
                copies.append((buffer, self._copied(node, now)))
        for buffer, copy in copies:
            self.graph.call_function(aten.copy_.default, (buffer, copy)).meta |= buffer.meta

    def _refuse_reader(self, tensor: Tensor, by: str) -> None:
        if id(tensor) in self.nodes:
            raise Unsuitable(f"the model looks at values while it runs ({by})")


def _described(node: fx.Node, tensor: Tensor, inside: fx.Node | None = None) -> fx.Node:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise Unsuitable("the model works with sparse or nested tensors")
    node.meta |= {"shape": tuple(tensor.shape), "stride": tensor.stride(), "dtype": tensor.dtype}
    node.meta["memory"] = inside or node
    return node


def _looks(op: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the values of tensors decide what comes out, or of which shape."""
    if op is aten.index.Tensor:  # only a mask chooses how many
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1]))
    return torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags


def _functional(op: OpOverload) -> OpOverload | None:
    """The same operation without ``out=``."""
    wanted = [(argument.name, str(argument.type)) for argument in op._schema.arguments if not argument.is_out]
    for name in op.overloadpacket.overloads():
        found: OpOverload = getattr(op.overloadpacket, name)
        if [(argument.name, str(argument.type)) for argument in found._schema.arguments] == wanted:
            return found
    return None


def _without_dropout(op: OpOverload, args: Any, kwargs: Any) -> bool:
    """Attention, which is marked as random, but is so only with dropout."""
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    names = {argument.name for argument in op._schema.arguments}
    return "dropout_p" in names and not given.get("dropout_p", 0.0)
