"""Low-rank adapters (Hu et al. 2022, ICLR, arXiv 2106.09685, Section 4): of a large model only these are trained.

What is not trained never crosses: server and clients compare its hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn import functional

from shoal.protos.errors import ExperimentError

__all__ = ["LoraLinear", "lora"]


class LoraLinear(nn.Module):
    """x ↦ W x + b + (α/r) B A x, of which A ``[r, in]`` and B ``[out, r]`` are trained; B begins as zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, freeze_a: bool) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(base.weight.new_empty(rank, base.in_features), requires_grad=not freeze_a)
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank
        # PyTorch's transformer layers take the weights of what has no hooks, and would pass the adapters by.
        self.register_forward_pre_hook(_called)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        adapted = functional.linear(functional.linear(x, self.a), self.b)
        return functional.linear(x, self.weight, self.bias) + self.scale * adapted


def _called(module: nn.Module, given: object) -> None:
    """Only to be there."""


def lora(
    module: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    only: Sequence[str] = ("*",),
    also: Sequence[str] = (),
    freeze_a: bool = False,
) -> nn.Module:
    """The model, frozen in place but for adapters beside its dense layers that ``only`` names (patterns of modules).

    ``also`` names parameters that are trained as they are. With ``freeze_a`` only B is, so that the mean of clients'
    products is the product of the means (FFA-LoRA, Sun et al. 2024, ICLR, arXiv 2403.12313). ExperimentError where a
    pattern names nothing.
    """
    parameters, dense = dict(module.named_parameters()), _dense(module)
    _check("dense layer", only, dense)
    _check("parameter", also, parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(_matches(name, also))
    for name, layer in dense.items():
        if not name:
            return LoraLinear(layer, rank, alpha, freeze_a)
        if _matches(name, only):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, LoraLinear(layer, rank, alpha, freeze_a))
    return module


def _dense(module: nn.Module) -> dict[str, nn.Linear]:
    """Not those of :class:`torch.nn.MultiheadAttention`, which takes their weights without calling them."""
    inside = [name for name, part in module.named_modules() if isinstance(part, nn.MultiheadAttention)]
    found = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return {name: part for name, part in found.items() if name.rpartition(".")[0] not in inside}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(kind: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ExperimentError(f"no {kind} is called {pattern!r}; the model has {', '.join(names) or 'none'}")
