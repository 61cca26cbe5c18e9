"""Local optimizers over one flat vector ``[P]``: PyTorch's rules, in the order PyTorch computes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shoal.client.local import LocalTraining

__all__ = ["Adam", "Optimizer", "Sgd", "optimizer_for"]


class Optimizer(Protocol):
    """Made anew for every task; ``step`` changes ``p`` in place and may overwrite ``g``."""

    def step(self, p: Tensor, g: Tensor, lr: float) -> None: ...


class Sgd:
    """SGD with momentum, Nesterov momentum and L2 weight decay, as ``torch.optim.SGD``."""

    def __init__(self, local: LocalTraining) -> None:
        self._local = local
        self._velocity: Tensor | None = None

    def step(self, p: Tensor, g: Tensor, lr: float) -> None:
        local = self._local
        if local.weight_decay:
            g.add_(p, alpha=local.weight_decay)
        if local.momentum:
            self._velocity = g.clone() if self._velocity is None else self._velocity.mul_(local.momentum).add_(g)
            g = g.add_(self._velocity, alpha=local.momentum) if local.nesterov else self._velocity
        p.add_(g, alpha=-lr)


class Adam:
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), as ``torch.optim.Adam`` and ``AdamW``."""

    def __init__(self, local: LocalTraining) -> None:
        self._local = local
        self._m: Tensor | None = None
        self._v: Tensor | None = None
        self._steps = 0

    def step(self, p: Tensor, g: Tensor, lr: float) -> None:
        local, (beta1, beta2) = self._local, self._local.betas
        if self._m is None or self._v is None:
            self._m, self._v = torch.zeros_like(p), torch.zeros_like(p)
        if local.weight_decay and local.optimizer == "adamw":
            p.mul_(1 - lr * local.weight_decay)
        elif local.weight_decay:
            g.add_(p, alpha=local.weight_decay)
        self._steps += 1
        self._m.lerp_(g, 1 - beta1)
        self._v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = self._v.sqrt().div_((1 - beta2**self._steps) ** 0.5).add_(local.eps)
        p.addcdiv_(self._m, root, value=-lr / (1 - beta1**self._steps))


def optimizer_for(local: LocalTraining) -> Optimizer:
    """A fresh optimizer for one task."""
    return Sgd(local) if local.optimizer == "sgd" else Adam(local)
