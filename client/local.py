"""What local training is: declared, so that engines can vectorise it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from shoal.protos.errors import ExperimentError

__all__ = ["LocalTraining"]


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: ``epochs`` passes over its shard (or ``steps`` optimizer steps) in batches.

    ``loss`` and ``metrics`` are registered names, ``"module:function"`` or functions of (output, target): a loss
    returns the batch mean, a metric one number an example (None: accuracy for classes, mae for mse). ``optimizer`` is
    ``"sgd"``, ``"adam"`` or ``"adamw"`` with PyTorch's rules, made anew for every task. In round r the learning rate is
    ``lr * lr_decay ** (r - 1)``. ``clip`` bounds the norm of every batch gradient. ``batch_size=0`` takes the whole
    shard as one batch. Each epoch shuffles anew; its last, smaller batch is kept unless ``drop_last`` (BatchNorm cannot
    train on a batch of one). In each round each client is a straggler with the probability ``stragglers``: it makes at
    random 1 to ``epochs`` − 1 epochs. A parameter that the loss does not reach has a gradient of zero.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Gt(0), Lt(math.inf)] = 0.1
    batch_size: Annotated[int, Ge(0)] = 32
    drop_last: bool = False
    epochs: Annotated[int, Ge(1)] = 1
    steps: Annotated[int, Ge(1)] | None = None
    stragglers: Annotated[float, Ge(0), Le(1)] = 0.0
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.0
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    lr_decay: Annotated[float, Gt(0)] = 1.0
    clip: Annotated[float, Gt(0)] | None = None
    loss: str | Callable[..., Any] = "cross-entropy"
    metrics: tuple[str | Callable[..., Any], ...] | None = None

    def __post_init__(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise ExperimentError(f"local.momentum belongs to 'sgd', not to {self.optimizer!r}; set local.betas")
        if self.nesterov and not self.momentum:
            raise ExperimentError("local.nesterov needs local.momentum > 0")
        if self.stragglers and (self.steps is not None or self.epochs < 2):
            raise ExperimentError(
                "local.stragglers do fewer epochs than declared: set local.epochs to 2 or more, no steps"
            )
        if self.metrics is None:
            # A mean of errors says nothing of classes, nor accuracy of a regression.
            fitting = {"cross-entropy": ("accuracy",), "binary-cross-entropy": ("accuracy",), "mse": ("mae",)}
            object.__setattr__(self, "metrics", fitting.get(self.loss, ()) if isinstance(self.loss, str) else ())
