"""FedYogi (Reddi et al. 2021, ICLR, arXiv 2003.00295, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from shoal.strategies import adaptive
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting
from shoal.strategies.schedule import scheduled

__all__ = ["FedYogi"]


@final
@dataclass(frozen=True)
class FedYogi(Strategy):
    """v ← v − (1 − β₂) Δ² sign(v − Δ²);  w ← w + η m / (√v + τ), without bias correction.

    Use it as FedAdam; v changes additively, so it forgets large updates more slowly. η and τ need tuning together with
    the local lr. η warms up over ``server_lr_warmup`` rounds, then falls by ``server_lr_decay`` with each round.

    Costs two models of server state.
    """

    server_lr: Annotated[float, Gt(0)] = 0.01
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
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
        v = v - (1 - self.beta2) * delta**2 * (v - delta**2).sign()
        lr = scheduled(self.server_lr, self.server_lr_decay, self.server_lr_warmup, context.round)
        return adaptive.step(state, m, v, lr, self.tau)
