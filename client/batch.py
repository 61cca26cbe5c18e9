"""A batch as a strategy's own gradient or loss sees it; see :mod:`shoal.strategies.base`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import EllipsisType

import torch
from torch import Tensor, nn

from shoal.client.lora import LoraLinear
from shoal.client.losses import Loss
from shoal.client.net import Net
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Segment
from shoal.strategies.base import Loss as OwnLoss

__all__ = ["NetBatch", "NetSlope", "joined"]


class NetBatch:
    """Examples ``x``, ``y`` before the weights that the net holds."""

    def __init__(
        self, net: Net, declared: Loss, x: Tensor, y: Tensor, labels: Tensor, part: int | EllipsisType
    ) -> None:
        self.net, self._declared, self.x, self.y, self.labels, self.part = net, declared, x, y, labels, part

    def rows(self, rows: slice) -> NetBatch:
        """Some of its examples, as a copy: a model may change its input in place."""
        return NetBatch(self.net, self._declared, self.x[rows].clone(), self.y[rows], self.labels, self.part)

    @property
    def output(self) -> Tensor:
        return self._passed[0]

    @property
    def features(self) -> Tensor:
        return self._passed[1]

    @cached_property
    def _passed(self) -> tuple[Tensor, Tensor]:
        with _last_dense(self.net.module) as taken:
            output = self.net.module(self.x.clone())  # which a model may change in place
        return output, _features(taken)

    @torch.no_grad()
    def features_at(self, parameters: Tensor) -> Tensor:
        module, names = self.net.module, [entry.name for entry in self.net.layout.of(Segment.TRAINABLE)]
        values = dict(zip(names, self.net.split(parameters), strict=True))
        with _last_dense(module) as taken:
            module.eval()
            try:
                torch.func.functional_call(module, values, (self.x.clone(),))
            finally:
                module.train()
        return _features(taken)

    def loss(self, output: Tensor) -> Tensor:
        return self._declared(output, self.y)

    def value(self, own: OwnLoss | None) -> Tensor:
        """The batch's loss: the declared one, or a strategy's own."""
        return self.loss(self.net.module(self.x)) if own is None else own(self)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Of that loss, for each weight; zeros for one that the loss does not reach."""
        weights = self.net.weights
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        if any(gradient is None for gradient in found):
            return tuple(torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))
        return found


class NetSlope:
    """The batch's gradient at any parameters; ``first`` is the loss at those that were asked for first."""

    def __init__(self, batch: NetBatch, own: OwnLoss | None) -> None:
        self._batch, self._own = batch, own
        self.size, self.part = len(batch.x), batch.part
        self.first: Tensor | None = None

    def __call__(self, at: Tensor, rows: slice = slice(None)) -> Tensor:
        self._batch.net.flat.copy_(at)
        batch = self._batch.rows(rows)
        loss = batch.value(self._own)
        if self.first is None:
            self.first = loss.detach()
        return joined(batch.gradients(loss))


def joined(gradients: Sequence[Tensor]) -> Tensor:
    """As one vector ``[P]``."""
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


@contextmanager
def _last_dense(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the dense layer takes that runs last, as the only element."""
    taken = list[Tensor]()

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        taken[:] = [given[0].flatten(1)]

    handles = [
        part.register_forward_pre_hook(look) for part in module.modules() if isinstance(part, nn.Linear | LoraLinear)
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _features(taken: list[Tensor]) -> Tensor:
    if not taken:
        raise ExperimentError("the strategy compares what a model's last dense layer takes, but the model has none")
    return taken[0]
