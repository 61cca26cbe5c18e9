"""Local optimizers over a flat vector ``[P]`` or a block ``[K, P]``: PyTorch's rules, in the order it computes them."""

from __future__ import annotations

from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

from shoal.client.local import LocalTraining

__all__ = ["Adam", "Optimizer", "Sgd", "clip_", "optimizer_for"]

Part = slice | EllipsisType


class Optimizer(Protocol):
    """Made anew for every task."""

    def step(self, p: Tensor, g: Tensor, lr: float, taken: int, part: Part = ...) -> None:
        """Change ``p`` in place, after ``taken`` steps; may overwrite ``g``. Both are ``part`` of a block."""


class Sgd:
    """SGD with momentum, Nesterov momentum and L2 weight decay, as ``torch.optim.SGD``."""

    def __init__(self, local: LocalTraining, like: Tensor) -> None:
        self._local = local
        self._velocity = torch.zeros_like(like) if local.momentum else None

    def step(self, p: Tensor, g: Tensor, lr: float, taken: int, part: Part = ...) -> None:
        local = self._local
        if local.weight_decay:
            g.add_(p, alpha=local.weight_decay)
        if self._velocity is not None:
            velocity = self._velocity[part].mul_(local.momentum).add_(g)
            g = g.add_(velocity, alpha=local.momentum) if local.nesterov else velocity
        p.add_(g, alpha=-lr)


class Adam:
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), as ``torch.optim.Adam`` and ``AdamW``."""

    def __init__(self, local: LocalTraining, like: Tensor) -> None:
        self._local = local
        self._m, self._v = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, p: Tensor, g: Tensor, lr: float, taken: int, part: Part = ...) -> None:
        local, (beta1, beta2), number = self._local, self._local.betas, taken + 1
        if local.weight_decay and local.optimizer == "adamw":
            p.mul_(1 - lr * local.weight_decay)
        elif local.weight_decay:
            g.add_(p, alpha=local.weight_decay)
        m = self._m[part].lerp_(g, 1 - beta1)
        v = self._v[part].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = v.sqrt().div_((1 - beta2**number) ** 0.5).add_(local.eps)
        p.addcdiv_(m, root, value=-lr / (1 - beta1**number))


def optimizer_for(local: LocalTraining, like: Tensor) -> Optimizer:
    """A fresh optimizer for one task, on parameters ``like`` these."""
    return Sgd(local, like) if local.optimizer == "sgd" else Adam(local, like)


def clip_(g: Tensor, limit: float) -> None:
    """Scale each gradient ``[..., P]`` in place to a norm of at most ``limit``, as ``clip_grad_norm_`` does."""
    norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    g.mul_(torch.clamp(limit / (norm + 1e-6), max=1.0))
