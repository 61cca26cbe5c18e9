"""What FedAdagrad, FedAdam and FedYogi share (Reddi et al. 2021, ICLR, arXiv 2003.00295, Algorithm 2).

::

    m ← β₁ m + (1 − β₁) Δ        v ← (the one line in which the three differ)        w ← w + η m / (√v + τ)

There is no bias correction in the paper, and v starts at τ² or above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.strategies.base import State, vector

__all__ = ["init", "momentum", "step"]


def init(parameters: Tensor, tau: float) -> State:
    """m₋₁ = 0 and v₋₁ = τ²."""
    return {
        "parameters": parameters,
        "momentum": torch.zeros_like(parameters),
        "second": torch.full_like(parameters, tau**2),
    }


def momentum(state: State, delta: Tensor, beta1: float) -> Tensor:
    """m ← β₁ m + (1 − β₁) Δ."""
    return beta1 * vector(state, "momentum") + (1 - beta1) * delta


def step(state: State, m: Tensor, v: Tensor, lr: float, tau: float) -> State:
    """w ← w + η m / (√v + τ), elementwise."""
    return {"parameters": vector(state, "parameters") + lr * m / (v.sqrt() + tau), "momentum": m, "second": v}
