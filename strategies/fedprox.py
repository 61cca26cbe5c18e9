"""FedProx (Li et al. 2020, MLSys, arXiv 1812.06127, Equation 2 and Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedProx"]


@final
@dataclass(frozen=True)
class FedProx(Strategy):
    """Clients descend fₖ(w) + μ/2 ‖w − w_sent‖²; the server averages as FedAvg.

    Use it where clients drift apart or do unequal work. No μ is right everywhere: the paper tunes it in {0.001, 0.01,
    0.1, 1}; μ = 0 is FedAvg, bit for bit.

    Costs nothing beyond FedAvg.
    """

    mu: Annotated[float, Ge(0)] = 0.01
    weighting: Weighting = "examples"

    citation = "Li et al. 2020, MLSys, Algorithm 2"
    family = "client drift"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        if self.mu == 0:
            return trainer.run(sent.parameters), mine
        return trainer.run(sent.parameters, drift=lambda w: self.mu * (w - sent.parameters)), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}
