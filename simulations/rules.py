"""How an operation of one client becomes one of K: each rule writes the stacked form of a recorded operation.

A rule gets the stacking and the recorded node, and returns None where it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from shoal.simulations.step import Unsuitable, memory

if TYPE_CHECKING:
    from shoal.simulations.stacking import Stacking

__all__ = ["apply_rule"]

aten = torch.ops.aten
Rule = Callable[["Stacking", Any], fx.Node | None]
RULES: dict[Any, Rule] = {}
DIMENSIONS = frozenset({"dim", "dims", "dim0", "dim1"})


def apply_rule(s: Stacking, node: Any) -> fx.Node | None:
    """The stacked form of a recorded operation; None if no rule fits it."""
    rule = RULES.get(node.target) or (_pointwise if torch.Tag.pointwise in node.target.tags else None)
    return None if rule is None else rule(s, node)


def rank(node: Any) -> int:
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
@rule(aten._to_copy.default, aten.fill_.Scalar, aten.copy_.default, aten._conj.default, aten._neg_view.default)
def _pointwise(s: Stacking, node: Any) -> fx.Node | None:
    """As it is, once each client's tensor has the result's rank."""
    dtypes = {n.meta["dtype"] for n in node.all_input_nodes}
    if len(dtypes) > 1 and any(rank(n) == 0 < rank(node) and s.stacked(n) for n in node.all_input_nodes):
        return None  # a number has less to say about the result's dtype than a vector

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
    """The same where nothing is written into it: an operation may have laid the clients out in another order."""
    return x.reshape(x.shape[0], *shape)


def expand_each(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Each client's tensor, repeated along new or single dimensions."""
    missing = len(shape) - (x.dim() - 1)
    return x.view(x.shape[0], *[1] * missing, *x.shape[1:]).expand(-1, *shape)


@rule(aten.view.default, aten._unsafe_view.default)
def _view(s: Stacking, node: Any) -> fx.Node:
    form = view_each if memory(node) in s.changed else reshape_each
    return s.call(form, s.now(node.args[0]), list(node.meta["shape"]))


@rule(aten.expand.default)
def _expand(s: Stacking, node: Any) -> fx.Node:
    return s.call(expand_each, s.now(node.args[0]), list(node.meta["shape"]))


@rule(aten.t.default)
def _t(s: Stacking, node: Any) -> fx.Node | None:
    return s.call(aten.transpose.int, s.now(node.args[0]), 1, 2) if rank(node) == 2 else None


@rule(
    *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor),
    *(aten._softmax.default, aten._log_softmax.default, aten._softmax_backward_data.default),
    *(aten._log_softmax_backward_data.default, aten.permute.default, aten.cumsum.default, aten.flip.default),
    *(aten.gather.default, aten.squeeze.dims, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default),
    *(aten.amin.default, aten.scatter.value, aten.scatter.src, aten.scatter_.value, aten.scatter_.src),
    *(aten.scatter_add.default, aten.scatter_add_.default),
)
def _along(s: Stacking, node: Any) -> fx.Node | None:
    """Operations along named dimensions, which move up by one."""
    op: OpOverload = node.target
    tensors, first = node.all_input_nodes, rank(node.all_input_nodes[0])
    ranks = first + 1 if op is aten.unsqueeze.default else first
    given = {a.name: a.default_value for a in op._schema.arguments if not a.kwarg_only}
    given |= dict(zip(given, node.args, strict=False))
    if not all(map(s.stacked, tensors)) or not first:
        return None
    if op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default):
        given["dim"] = given["dim"] or list(range(first))
    moved = {name: _up(value, ranks) if name in DIMENSIONS else s.now(value) for name, value in given.items()}
    if op is aten.permute.default:
        moved["dims"] = [0, *moved["dims"]]
    return s.call(op, *moved.values(), **node.kwargs)


def _up(dim: Any, rank: int) -> Any:
    return [_up(d, rank) for d in dim] if isinstance(dim, list | tuple) else dim % rank + 1


@rule(aten.index_put.default, aten.index_put_.default)
def _index_put(s: Stacking, node: Any) -> fx.Node | None:
    """``x[mask] = number``; other values for a mask depend on how much of it is true."""
    x, indices, value, *accumulate = node.args
    if len(indices) > 1 or indices[0].meta["dtype"] is not torch.bool or rank(value) or any(accumulate):
        return None
    mask, number = s.now(indices[0]), s.now(value)
    for _ in range(rank(x) - rank(indices[0])):
        mask = s.call(aten.unsqueeze.default, mask, -1)
    for _ in range(rank(x) if s.stacked(value) else 0):
        number = s.call(aten.unsqueeze.default, number, -1)
    filled = s.call(aten.where.self, mask, number, s.now(x))
    return filled if node.target is aten.index_put.default else s.call(aten.copy_.default, s.now(x), filled)


@rule(aten.sum.default, aten.mean.default)
def _whole(s: Stacking, node: Any) -> fx.Node | None:
    (value,) = node.all_input_nodes
    along = aten.sum.dim_IntList if node.target is aten.sum.default else aten.mean.dim
    if not rank(value):
        return s.call(aten.clone.default, s.made[value])
    return s.call(along, s.now(value), list(range(1, rank(value) + 1)), **node.kwargs)


@rule(aten.cat.default, aten.stack.default)
def _cat(s: Stacking, node: Any) -> fx.Node | None:
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not all(s.stacked(part) for part in parts):
        return None
    return s.call(node.target, s.now(parts), _up(dim, rank(node)))


# --- products --------------------------------------------------------------------------------------------------------


@rule(aten.mm.default)
def _mm(s: Stacking, node: Any) -> fx.Node:
    both = all(s.stacked(side) for side in node.args)
    return s.call(aten.bmm.default if both else torch.matmul, *s.now(node.args))


@rule(aten.bmm.default)
def _bmm(s: Stacking, node: Any) -> fx.Node:
    return s.call(torch.matmul, *s.now(node.args))


@rule(aten.addmm.default)
def _addmm(s: Stacking, node: Any) -> fx.Node | None:
    bias, a, b = node.args
    if not all(s.stacked(side) for side in (bias, a, b)) or node.kwargs:
        return None
    wide = s.now(bias)
    for _ in range(2 - rank(bias)):
        wide = s.call(aten.unsqueeze.default, wide, 1)
    return s.call(aten.baddbmm.default, wide, s.now(a), s.now(b))


# --- embeddings ------------------------------------------------------------------------------------------------------


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Each client's rows, without a copy of the table. vmap would give the next client's for a token out of range."""
    if tokens.numel() and tokens.min() < 0:
        raise IndexError("index out of range in self")
    clients = torch.arange(len(weight), device=weight.device)
    return weight[clients.view(-1, *[1] * (tokens.dim() - 1)), tokens]


@rule(aten.embedding.default)
def _embedding(s: Stacking, node: Any) -> fx.Node | None:
    weight, tokens = node.args[:2]
    return s.call(embedding, *s.now((weight, tokens))) if s.stacked(weight) and s.stacked(tokens) else None


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def nll(x: Tensor, y: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Each client's mean negative log-likelihood ``[K]`` and the number of its examples that count."""
    each = aten.nll_loss_forward(x.flatten(0, 1), y.flatten(), None, 0, ignore)[0].view(y.shape)
    counted = (y != ignore).sum(1).to(x.dtype)
    return each.sum(1) / counted, counted


def nll_backward(gradient: Tensor, x: Tensor, y: Tensor, ignore: int, counted: Tensor) -> Tensor:
    """The gradient ``[K, B, C]`` of :func:`nll`."""
    each = (gradient / counted).unsqueeze(1).expand(y.shape).flatten()
    flat: Tensor = aten.nll_loss_backward(each, x.flatten(0, 1), y.flatten(), None, 0, ignore, x.new_zeros(()))
    return flat.view(x.shape)


@rule(aten.nll_loss_forward.default)
def _nll(s: Stacking, node: Any) -> fx.Node | None:
    x, y, weight, reduction, ignore = node.args
    if not (s.stacked(x) and s.stacked(y)) or weight is not None or reduction != 1 or rank(x) != 2:
        return None
    return s.call(nll, s.now(x), s.now(y), ignore)


@rule(aten.nll_loss_backward.default)
def _nll_backward(s: Stacking, node: Any) -> fx.Node | None:
    gradient, x, y, weight, reduction, ignore, counted = node.args
    fits = all(s.stacked(v) for v in (gradient, x, y, counted)) and weight is None and reduction == 1
    if not fits or rank(x) != 2:
        return None
    return s.call(nll_backward, s.now(gradient), s.now(x), s.now(y), ignore, s.now(counted))


# --- batch normalisation ---------------------------------------------------------------------------------------------


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the clients' channels side by side. The running statistics change in place, which vmap would lose."""
    k, b, c = x.shape[:3]
    side_by_side = x.transpose(0, 1).reshape(b, k * c, *x.shape[3:])
    w, v = (None if value is None else value.expand(k, c).reshape(-1) for value in (weight, bias))
    running = mean.reshape(-1).clone(), var.reshape(-1).clone()
    out, *saved = aten.native_batch_norm(side_by_side, w, v, *running, True, momentum, eps)
    for kept, new in zip((mean, var), running, strict=True):
        kept.copy_(new.view(k, c))
    return out.view(b, k, c, *x.shape[3:]).transpose(0, 1), saved[0].view(k, c), saved[1].view(k, c)


@rule(aten.native_batch_norm.default)
def _batch_norm(s: Stacking, node: Any) -> fx.Node | None:
    x, weight, bias, mean, var, training, momentum, eps = node.args
    if not training or mean is None:
        return None
    if not all(map(s.stacked, (x, mean, var))):
        raise Unsuitable("its batch normalisation keeps its statistics outside of the state")
    return s.call(batch_norm, *s.now((x, weight, bias, mean, var)), momentum, eps)
