"""FedAdagrad (Reddi et al. 2021, ICLR, arXiv 2003.00295, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from shoal.strategies import adaptive
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting
from shoal.strategies.schedule import scheduled

__all__ = ["FedAdagrad"]


@final
@dataclass(frozen=True)
class FedAdagrad(Strategy):
    """v ← v + Δ²;  w ← w + η Δ / (√v + τ).

    Use it where gradients are sparse (text). Steps only ever shrink. η and τ need tuning together with the local lr:
    the paper searches η in 10^{-3 … 1.5} and τ in 10^{-5 … -1}. η warms up over ``server_lr_warmup`` rounds, then falls
    by ``server_lr_decay`` with each round.

    Costs two models of server state.
    """

    server_lr: Annotated[float, Gt(0)] = 0.1
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.0
    tau: Annotated[float, Gt(0)] = 1e-3
    weighting: Weighting = "examples"
    server_lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    server_lr_warmup: Annotated[int, Ge(0)] = 0

    citation = "Reddi et al. 2021, ICLR, Algorithm 2"
    family = "server optimizer"

    def init(self, parameters: Tensor) -> State:
        return adaptive.init(parameters, self.tau)

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        delta, v = WeightedMean.finish(total), vector(state, "second")
        m = adaptive.momentum(state, delta, self.beta1)
        v = v + delta**2
        lr = scheduled(self.server_lr, self.server_lr_decay, self.server_lr_warmup, context.round)
        return adaptive.step(state, m, v, lr, self.tau)
