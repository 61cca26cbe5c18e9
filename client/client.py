"""Training in a way that cannot be declared: subclass :class:`Client` and write your own ``fit``.

Strategies work with it as with declared training: what one adds to the gradient (FedProx's pull, SCAFFOLD's correction)
is applied by :meth:`Work.step`, or by :meth:`Work.correct` in a hand-written loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net
from shoal.client.trainer import LeanTrainer, Turn, declared_batches
from shoal.protos.errors import ExperimentError, InvalidUpdate
from shoal.strategies.base import Drift, Gradient, Loss, Strategy, Update, drift_at
from shoal.strategies.sums import Carried

__all__ = ["RESERVED", "Client", "FitTrainer", "Work"]

RESERVED = frozenset({"examples", "steps", "lr_sum", "bytes_down", "bytes_up"})  # the platform's own numbers
RESERVED |= {"round", "kind", "client", "failed"}  # and what else a line of clients.jsonl has


class Work:
    """What ``fit`` gets.

    ``model`` holds the sent parameters. ``data`` is this client's shard, ``client`` its name, ``round`` the round's
    number; ``rng`` is a random stream of this client and round. ``local`` is the declared training and ``lr`` its
    learning rate in this round.
    """

    def __init__(
        self, turn: Turn, net: Net, local: LocalTraining, strategy: Strategy, drift: Drift | None, epochs: int | None
    ) -> None:
        self.model: nn.Module = net.module
        self.data: Shard = turn.shard
        self.client, self.round, self.rng, self.lr, self.local = turn.client, turn.round, turn.rng, turn.lr, local
        self.steps, self.lr_sum = 0, 0.0
        self._turn, self._net, self._strategy, self._drift, self._epochs = turn, net, strategy, drift, epochs

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that declared training would see."""
        return declared_batches(self.local, self._turn, self._epochs)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step: zero the gradients, backward, the strategy's correction, step.

        ExperimentError if the strategy is not valid with this optimizer.
        """
        self._check(optimizer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.correct(optimizer.param_groups[0]["lr"])
        optimizer.step()

    def correct(self, lr: float) -> None:
        """Call once per optimizer step, between ``backward()`` and ``step()``: adds what the strategy asks for."""
        self.steps, self.lr_sum = self.steps + 1, self.lr_sum + lr
        if self._drift is None:
            return
        drift = drift_at(self._drift, self._net.flat)
        for weight, part in zip(self._net.weights, self._net.split(drift), strict=True):
            weight.grad = part.clone() if weight.grad is None else weight.grad.add_(part)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        kind, group = type(optimizer).__name__, optimizer.param_groups[0]
        refusal = self._strategy.refuses(_Used(kind.lower(), group.get("momentum", 0.0), group.get("nesterov", False)))
        if refusal:
            raise ExperimentError(f"strategy {type(self._strategy).__name__} is not valid with fit's {kind}: {refusal}")


@dataclass(frozen=True)
class _Used:
    """A PyTorch optimizer in the words of a declaration, for the strategy to judge."""

    optimizer: str
    momentum: float
    nesterov: bool
    clip: float | None = None
    weight_decay: float = 0.0


class Client(ABC):
    """A participant with its own training loop. One object serves all clients of a process: keep no state on it."""

    @abstractmethod
    def fit(self, work: Work) -> Mapping[str, float] | None:
        """Train ``work.model`` in place on ``work.data``; return metrics of your own, or None."""


class FitTrainer(LeanTrainer):
    """Runs a :class:`Client`'s ``fit`` where a strategy asks for training."""

    def __init__(
        self, client: Client, strategy: Strategy, net: Net, local: LocalTraining, turn: Turn, carried: Carried
    ) -> None:
        super().__init__(net, local, turn, carried)
        self._client, self._strategy = client, strategy

    def run(
        self,
        start: Tensor,
        *,
        drift: Drift | None = None,
        gradient: Gradient | None = None,
        loss: Loss | None = None,
        mask: Tensor | None = None,
        epochs: int | None = None,
    ) -> Update:
        if gradient is not None or loss is not None or mask is not None:
            raise ExperimentError(
                f"strategy {type(self._strategy).__name__} trains in a way of its own (another gradient, loss or part "
                f"of the model), which a fit of your own does not know; declare local training instead"
            )
        net, work = self._net, Work(self._turn, self._net, self._local, self._strategy, drift, epochs)
        net.module.zero_grad(set_to_none=True)
        self._begin(start)
        net.module.train()  # all of it: a fit may leave a part in evaluation
        metrics = self._client.fit(work) or {}
        net.collect()
        _check_fit(work, drift, metrics)
        numbers = {name: float(value) for name, value in metrics.items()}
        return self._update(start, work.steps, work.lr_sum, numbers)


def _check_fit(work: Work, drift: Drift | None, metrics: Mapping[str, float]) -> None:
    if drift is not None and not work.steps:
        raise InvalidUpdate(
            f"fit of client {work.client!r} made no corrected step, but the strategy corrects gradients; "
            f"use work.step(loss, optimizer), or work.correct(lr) between backward() and step()"
        )
    taken = RESERVED & metrics.keys()
    if taken:
        raise InvalidUpdate(f"fit of client {work.client!r} returns {sorted(taken)}, names of Shoal's own; rename them")
