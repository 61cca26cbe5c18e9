"""Server momentum (Hsu, Qi and Brown 2019, arXiv 1909.06335, Section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedAvgM"]


@final
@dataclass(frozen=True)
class FedAvgM(Strategy):
    """v ← β v + Δ;  w ← w + η v, or with ``nesterov`` w ← w + η (Δ + β v).

    Use it on non-IID data with small cohorts, where it smooths the rounds. One model of server state, nothing more on
    the wire. The paper searches β in {0, 0.7, 0.9, 0.97, 0.99, 0.997}; β = 0 and η = 1 is FedAvg, bit for bit.
    """

    server_lr: Annotated[float, Gt(0)] = 1.0
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weighting: Weighting = "examples"

    citation = "Hsu, Qi and Brown 2019, arXiv 1909.06335, Section 4.3"

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
        return {"parameters": vector(state, "parameters") + self.server_lr * step, "velocity": velocity}
