"""Server momentum (Hsu, Qi and Brown 2019, arXiv 1909.06335, Section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting
from shoal.strategies.schedule import scheduled

__all__ = ["FedAvgM"]


@final
@dataclass(frozen=True)
class FedAvgM(Strategy):
    """v ← β v + Δ;  w ← w + η v, or with ``nesterov`` w ← w + η (Δ + β v).

    Use it on non-IID data with small cohorts, where it smooths the rounds. The paper searches β in {0, 0.7, 0.9, 0.97,
    0.99, 0.997}; β = 0 and η = 1 is FedAvg, bit for bit. η warms up over ``server_lr_warmup`` rounds, then falls by
    ``server_lr_decay`` with each round.

    Costs one model of server state.
    """

    server_lr: Annotated[float, Gt(0)] = 1.0
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weighting: Weighting = "examples"
    server_lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    server_lr_warmup: Annotated[int, Ge(0)] = 0

    citation = "Hsu, Qi and Brown 2019, arXiv 1909.06335, Section 4.3"
    family = "server optimizer"

    def init(self, parameters: Tensor) -> State:
        return {"parameters": parameters, "velocity": torch.zeros_like(parameters)}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        delta = WeightedMean.finish(total)
        velocity = self.momentum * vector(state, "velocity") + delta
        step = delta + self.momentum * velocity if self.nesterov else velocity
        lr = scheduled(self.server_lr, self.server_lr_decay, self.server_lr_warmup, context.round)
        return {"parameters": vector(state, "parameters") + lr * step, "velocity": velocity}
