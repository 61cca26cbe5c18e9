"""FedYogi (Reddi et al. 2021, ICLR, arXiv 2003.00295, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from shoal.strategies import adaptive
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedYogi"]


@final
@dataclass(frozen=True)
class FedYogi(Strategy):
    """v ← v − (1 − β₂) Δ² sign(v − Δ²);  w ← w + η m / (√v + τ), without bias correction.

    Use it as FedAdam; v changes additively, so it forgets large updates more slowly. Two models of server state,
    nothing more on the wire. η and τ need tuning together with the local lr.
    """

    server_lr: Annotated[float, Gt(0)] = 0.01
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    tau: Annotated[float, Gt(0)] = 1e-3
    weighting: Weighting = "examples"

    citation = "Reddi et al. 2021, ICLR, Algorithm 2"

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
        return adaptive.step(state, m, v, self.server_lr, self.tau)
