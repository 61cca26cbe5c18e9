"""An operation for K clients under ``torch.vmap``, where no rule says how it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from shoal.simulations.step import Unsuitable

__all__ = ["Mapped"]

functorch: Any = torch._C._functorch
functorch._set_vmap_fallback_warning_enabled(False)  # it would tell users to complain to PyTorch


class Mapped:
    """``nodes`` are the operation's tensors, each either ``stacked`` or the same for all clients.

    The first result is compared with that of the operation for one client: not all of vmap's rules are right.
    """

    def __init__(self, op: OpOverload, args: Any, kwargs: Any, stacked: Sequence[fx.Node]) -> None:
        self._op = op
        self._flat, self._tree = tree_flatten((args, kwargs))
        self._at = [i for i, leaf in enumerate(self._flat) if isinstance(leaf, fx.Node)]
        self.nodes: list[fx.Node] = [self._flat[i] for i in self._at]
        self._axes = tuple(0 if node in stacked else None for node in self.nodes)
        self._present = set[int]()  # which of several results there are
        self._mapped = torch.vmap(self._once, in_dims=self._axes)
        self._checked = "empty" in str(op)  # what is in fresh memory is anybody's guess

    def __call__(self, *tensors: Tensor) -> Any:
        before = None if self._checked else [tensor.clone() for tensor in tensors]
        try:
            out = self._mapped(*tensors)
            right = before is None or self._check(before, tensors, out)
        except Exception as error:
            raise Unsuitable(f"{self._op} cannot be done for several clients at once") from error
        if not right:
            raise Unsuitable(f"{self._op} is done wrong for several clients at once")
        self._checked = True
        # Several results are indexed as those of the operation would be.
        return out if isinstance(out, Tensor) else dict(zip(sorted(self._present), out, strict=True))

    def _once(self, *tensors: Tensor) -> Any:
        """For one client; None among its results is left out."""
        filled = list(self._flat)
        for i, tensor in zip(self._at, tensors, strict=True):
            filled[i] = tensor
        args, kwargs = tree_unflatten(filled, self._tree)
        out = self._op(*args, **kwargs)
        if isinstance(out, Tensor):
            return out
        self._present.update(i for i, part in enumerate(out) if part is not None)
        return tuple(part for part in out if part is not None)

    def _check(self, before: Sequence[Tensor], after: Sequence[Tensor], out: Any) -> bool:
        """Whether two clients' results, and arguments changed in place, are as the operation alone gives them."""
        found = [*zip(self._axes, after, strict=True), *((0, part) for part in tree_leaves(out))]
        for k in (0, -1):
            given = [_laid_out(*one, k) for one in zip(self.nodes, self._axes, before, strict=True)]
            mine = [tensor if axis is None else tensor[k] for axis, tensor in found]
            if not _close(mine, [*given, *tree_leaves(self._once(*given))], len(given)):
                return False
        return True


def _laid_out(node: fx.Node, axis: int | None, tensor: Tensor, k: int) -> Tensor:
    """One client's, in memory as it was recorded: an operation may depend on that."""
    one = tensor if axis is None else tensor[k]
    if 0 in node.meta["stride"]:  # expanded: nothing can be copied into that
        return one.clone()
    return torch.empty_strided(one.shape, node.meta["stride"], dtype=one.dtype, device=one.device).copy_(one)


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], given: int) -> bool:
    """Up to rounding, which grows with the results (those after the ``given``), not with each one of them."""
    floats = [b.abs().nan_to_num(0, 0, 0).max() for b in expected[given:] if b.numel() and b.dtype.is_floating_point]
    apart = 1e-3 * float(max(floats, default=0.0))
    pairs = zip(found, expected, strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-3, apart, True) for a, b in pairs)
