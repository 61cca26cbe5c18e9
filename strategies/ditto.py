"""Ditto (Li et al. 2021, ICML, arXiv 2012.04221, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Gt
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["Ditto"]


@final
@dataclass(frozen=True)
class Ditto(Strategy):
    """Beside FedAvg's model w, each client trains one of its own: vₖ ← vₖ − η (∇fₖ(vₖ) + λ (vₖ − w)).

    Use it where clients differ and come back: each is evaluated on its own model, which λ pulls towards the global
    one (λ = 0: purely local).

    Costs one model of state per client and twice the local work, or as much more as ``personal_epochs`` says.
    """

    lam: Annotated[float, Ge(0)] = 1.0
    personal_epochs: Annotated[int, Gt(0)] | None = None
    weighting: Weighting = "examples"

    citation = "Li et al. 2021, ICML, Algorithm 1"
    family = "personalisation"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        update, own = trainer.run(sent.parameters), mine["model"]
        pulled = trainer.run(own, drift=lambda v: self.lam * (v - sent.parameters), epochs=self.personal_epochs)
        return update, {"model": own + pulled.delta}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return mine["model"]
