"""Losses and metrics by name. A loss returns the mean over a batch; a metric returns one number for each example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from shoal.protos import registry

__all__ = ["accuracy", "binary_cross_entropy", "cross_entropy", "loss_named", "mae", "metric_named", "mse"]

Loss = Callable[[Tensor, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Softmax cross-entropy of logits ``[n, C, …]`` against class numbers ``[n, …]``."""
    return functional.cross_entropy(output, target)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; a trailing dimension of one is ignored."""
    return functional.mse_loss(output, target.to(output.dtype).reshape(output.shape))


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Sigmoid cross-entropy of one logit an example against 0 or 1."""
    return functional.binary_cross_entropy_with_logits(output, target.to(output.dtype).reshape(output.shape))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest logit is the label (or the sign of a single logit), else 0: ``[n]``."""
    if output.ndim == 1 or output.shape[1] == 1:
        return ((output.reshape(-1) > 0) == (target.reshape(-1) > 0)).float()
    return (output.argmax(dim=1) == target).float().reshape(len(target), -1).mean(dim=1)


def mae(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error of each example: ``[n]``."""
    difference = output - target.to(output.dtype).reshape(output.shape)
    return torch.abs(difference).reshape(len(target), -1).mean(dim=1)


def loss_named(loss: str | Loss) -> Loss:
    """The function behind a name; a function is itself."""
    return registry.load("shoal.losses", loss) if isinstance(loss, str) else loss


def metric_named(metric: str | Metric) -> tuple[str, Metric]:
    """The metric's name in results, and its function."""
    if isinstance(metric, str):
        return metric.rpartition(":")[2], registry.load("shoal.metrics", metric)
    return getattr(metric, "__name__", "metric"), metric
