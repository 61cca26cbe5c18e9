"""One client's recorded step becomes the step of K clients: every tensor of a client's own gains a leading axis.

Most operations have a short rule below, which costs one call for all clients. What has none runs under ``torch.vmap``:
correct, though slower. The number of clients is not built in, so one program serves blocks of any size.

With ``fuse`` the program trains: each weight's gradient goes into the weight as soon as nothing else reads it, and a
gradient that is a matrix product is accumulated by that product itself, so no gradient is ever written to memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from shoal.simulations.capture import Step, Unsuitable, live, writes
from shoal.simulations.fusing import Descent, descents

__all__ = ["stack"]

aten = torch.ops.aten
Rule = Callable[..., fx.Node]
RULES: dict[Any, Rule] = {}
DIMENSIONS = frozenset({"dim", "dims", "dim0", "dim1"})


def stack(step: Step, *, fuse: bool) -> Callable[..., Any]:
    """The step as a function of stacked weights, buffers, counters, x, y and draws, in the order of the graph's inputs.

    It returns the clients' losses ``[K]`` and, unless fused, a gradient for each weight that has one. A fused one takes
    ``rate`` (minus the learning rate) as its first argument and changes the weights instead.
    """
    return _Stacking(step).program(fuse).forward


class _Stacking:
    """Goes once through the recorded graph and writes the stacked one."""

    def __init__(self, step: Step) -> None:
        self.step, self.graph, self.root = step, fx.Graph(), torch.nn.Module()
        self.made: dict[fx.Node, fx.Node] = {}
        self.shared = set(step.constants)  # nodes that are the same for all clients
        self.writes = any(writes(node) and node.args[0] not in step.counters for node in step.graph.nodes)

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
            self.shared.add(node)
            return self.graph.node_copy(node, self.made.__getitem__)
        if node.target is operator.getitem:
            return self.graph.node_copy(node, self.made.__getitem__)
        rule = RULES.get(node.target) or (_pointwise if torch.Tag.pointwise in node.target.tags else None)
        done = rule(self, node) if rule is not None else None
        return _vmapped(self, node) if done is None else done

    # What rules are written with.

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def stacked(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node not in self.shared

    def now(self, value: Any) -> Any:
        """The stacked form of an argument of the recorded graph."""
        return fx.node.map_arg(value, self.made.__getitem__)


def rank(node: fx.Node) -> int:
    """Of one client's tensor."""
    return len(node.meta["shape"])


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule: a function of the stacking and a recorded node; None means that it does not fit."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


# --- element by element ----------------------------------------------------------------------------------------------


@rule(aten.ones_like.default, aten.zeros_like.default, aten.empty_like.default, aten.clone.default, aten.alias.default)
@rule(aten._to_copy.default, aten.fill_.Scalar, aten.copy_.default)
def _pointwise(s: _Stacking, node: fx.Node) -> fx.Node | None:
    """As it is, once each client's tensor has the result's rank."""
    writes = node.target._schema.is_mutable
    if writes and not s.stacked(node.args[0]):
        return None

    def widened(value: Any) -> Any:
        if not s.stacked(value):
            return s.now(value)
        wide = s.made[value]
        for _ in range(rank(node) - rank(value)):
            wide = s.call(aten.unsqueeze.default, wide, 1)
        return wide

    return s.graph.call_function(
        node.target, fx.node.map_arg(node.args, widened), fx.node.map_arg(node.kwargs, widened)
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


def view_each(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A view of each client's tensor."""
    return x.view(x.shape[0], *shape)


def reshape_each(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same where nothing is written into views: an operation may have laid the clients out in another order."""
    return x.reshape(x.shape[0], *shape)


def expand_each(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Each client's tensor, repeated along new or single dimensions."""
    missing = len(shape) - (x.dim() - 1)
    return x.view(x.shape[0], *[1] * missing, *x.shape[1:]).expand(-1, *shape)


@rule(aten.view.default, aten._unsafe_view.default)
def _view(s: _Stacking, node: fx.Node) -> fx.Node:
    return s.call(view_each if s.writes else reshape_each, s.now(node.args[0]), list(node.meta["shape"]))


@rule(aten.expand.default)
def _expand(s: _Stacking, node: fx.Node) -> fx.Node:
    return s.call(expand_each, s.now(node.args[0]), list(node.meta["shape"]))


@rule(aten.t.default)
def _t(s: _Stacking, node: fx.Node) -> fx.Node | None:
    return s.call(aten.transpose.int, s.now(node.args[0]), 1, 2) if rank(node) == 2 else None


@rule(
    *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor),
    *(aten._softmax.default, aten._log_softmax.default, aten._softmax_backward_data.default),
    *(aten._log_softmax_backward_data.default, aten.permute.default, aten.cumsum.default, aten.flip.default),
    *(aten.gather.default, aten.squeeze.dims, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default),
)
def _along(s: _Stacking, node: fx.Node) -> fx.Node | None:
    """Operations along named dimensions, which move up by one."""
    op: OpOverload = node.target  # type: ignore[assignment]
    tensors, first = node.all_input_nodes, rank(node.all_input_nodes[0])
    given = dict(zip((argument.name for argument in op._schema.arguments), node.args, strict=False))
    if not (all(map(s.stacked, tensors)) and first) or (op is aten.unsqueeze.default and given["dim"] < 0):
        return None
    if op in (aten.sum.dim_IntList, aten.mean.dim):
        given["dim"] = given["dim"] or list(range(first))
    moved = {name: _up(value, first) if name in DIMENSIONS else s.now(value) for name, value in given.items()}
    if op is aten.permute.default:
        moved["dims"] = [0, *moved["dims"]]
    return s.call(op, *moved.values(), **node.kwargs)


def _up(dim: Any, rank: int) -> Any:
    return [_up(d, rank) for d in dim] if isinstance(dim, list | tuple) else dim % rank + 1


@rule(aten.sum.default, aten.mean.default)
def _whole(s: _Stacking, node: fx.Node) -> fx.Node | None:
    (value,) = node.all_input_nodes
    along = aten.sum.dim_IntList if node.target is aten.sum.default else aten.mean.dim
    if not rank(value):
        return s.now(value)  # type: ignore[no-any-return]
    return s.call(along, s.now(value), list(range(1, rank(value) + 1)), **node.kwargs)


@rule(aten.cat.default, aten.stack.default)
def _cat(s: _Stacking, node: fx.Node) -> fx.Node | None:
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not all(s.stacked(part) for part in parts):  # type: ignore[union-attr]
        return None
    return s.call(node.target, s.now(parts), _up(dim, rank(node)))


# --- products --------------------------------------------------------------------------------------------------------


@rule(aten.mm.default)
def _mm(s: _Stacking, node: fx.Node) -> fx.Node:
    both = all(s.stacked(side) for side in node.args)
    return s.call(aten.bmm.default if both else torch.matmul, *s.now(node.args))


@rule(aten.bmm.default)
def _bmm(s: _Stacking, node: fx.Node) -> fx.Node:
    return s.call(torch.matmul, *s.now(node.args))


@rule(aten.addmm.default)
def _addmm(s: _Stacking, node: fx.Node) -> fx.Node | None:
    bias, a, b = node.args
    if not all(s.stacked(side) for side in (bias, a, b)) or node.kwargs:
        return None
    wide = s.call(aten.unsqueeze.default, s.now(bias), 1) if rank(bias) == 1 else s.now(bias)  # type: ignore[arg-type]
    return s.call(aten.baddbmm.default, wide, s.now(a), s.now(b))


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def nll(x: Tensor, y: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Each client's mean negative log-likelihood ``[K]`` and the number of its examples that count."""
    each = aten.nll_loss_forward(x.flatten(0, 1), y.flatten(), None, 0, ignore)[0].view(y.shape)
    counted = (y != ignore).sum(1).to(x.dtype)
    return each.sum(1) / counted, counted


def nll_backward(gradient: Tensor, x: Tensor, y: Tensor, ignore: int, counted: Tensor) -> Tensor:
    """The gradient ``[K, B, C]`` of :func:`nll`."""
    each = (gradient / counted).unsqueeze(1).expand(y.shape).flatten()
    return aten.nll_loss_backward(each, x.flatten(0, 1), y.flatten(), None, 0, ignore, x.new_zeros(())).view(x.shape)


@rule(aten.nll_loss_forward.default)
def _nll(s: _Stacking, node: fx.Node) -> fx.Node | None:
    x, y, weight, reduction, ignore = node.args
    if not (s.stacked(x) and s.stacked(y)) or weight is not None or reduction != 1 or rank(x) != 2:  # type: ignore[arg-type]
        return None
    return s.call(nll, s.now(x), s.now(y), ignore)


@rule(aten.nll_loss_backward.default)
def _nll_backward(s: _Stacking, node: fx.Node) -> fx.Node | None:
    gradient, x, y, weight, reduction, ignore, counted = node.args
    fits = all(s.stacked(v) for v in (gradient, x, y, counted)) and weight is None and reduction == 1
    if not fits or rank(x) != 2:  # type: ignore[arg-type]
        return None
    return s.call(nll_backward, s.now(gradient), s.now(x), s.now(y), ignore, s.now(counted))


# --- batch normalisation ---------------------------------------------------------------------------------------------


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the clients' channels side by side. The running statistics change in place, which vmap would lose."""
    k, b, c = x.shape[:3]
    side_by_side = x.transpose(0, 1).reshape(b, k * c, *x.shape[3:])
    w, v = (None if value is None else value.reshape(-1) for value in (weight, bias))
    running = mean.reshape(-1).clone(), var.reshape(-1).clone()
    out, *saved = aten.native_batch_norm(side_by_side, w, v, *running, True, momentum, eps)
    for kept, new in zip((mean, var), running, strict=True):
        kept.copy_(new.view(k, c))
    return out.view(b, k, c, *x.shape[3:]).transpose(0, 1), saved[0].view(k, c), saved[1].view(k, c)


@rule(aten.native_batch_norm.default)
def _batch_norm(s: _Stacking, node: fx.Node) -> fx.Node | None:
    x, weight, bias, mean, var, training, momentum, eps = node.args
    if not training or mean is None:
        return None
    given = [value for value in (x, weight, bias, mean, var) if value is not None]
    if not all(map(s.stacked, given)):
        raise Unsuitable("its batch normalisation is partly frozen or keeps its statistics outside of the state")
    return s.call(batch_norm, *s.now((x, weight, bias, mean, var)), momentum, eps)


# --- everything else -------------------------------------------------------------------------------------------------


def _vmapped(s: _Stacking, node: fx.Node) -> fx.Node:
    """The operation under vmap. None in place of a tensor stays None."""
    op: OpOverload = node.target  # type: ignore[assignment]
    flat, tree = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    at = [i for i, value in enumerate(flat) if isinstance(value, fx.Node)]
    axes = tuple(0 if s.stacked(flat[i]) else None for i in at)

    def once(*tensors: Tensor) -> Any:
        filled = list(flat)
        for i, tensor in zip(at, tensors, strict=True):
            filled[i] = tensor
        args, kwargs = torch.utils._pytree.tree_unflatten(filled, tree)
        out = op(*args, **kwargs)
        if isinstance(out, Tensor):
            return out
        present.update(i for i, part in enumerate(out) if part is not None)
        return tuple(part for part in out if part is not None)

    present = set[int]()
    mapped = torch.vmap(once, in_dims=axes)

    def each(*tensors: Tensor) -> Any:
        out = mapped(*tensors)
        if isinstance(out, Tensor):
            return out
        return dict(zip(sorted(present), out, strict=True))  # indexed as the tuple would be

    each.__name__ = f"each_{op.__name__.replace('.', '_')}"
    return s.call(each, *(s.made[flat[i]] for i in at))
