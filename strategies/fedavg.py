"""Federated averaging (McMahan et al. 2017, AISTATS, arXiv 1602.05629, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedAvg"]


@final
@dataclass(frozen=True)
class FedAvg(Strategy):
    """w ← w + Σ nₖ Δₖ / Σ nₖ.

    Use it first: every comparison needs it. ``weighting="uniform"`` gives each client the same say.

    Costs one download and one upload of the model a round, no state.
    """

    weighting: Weighting = "examples"

    citation = "McMahan et al. 2017, AISTATS, Algorithm 1"
    family = "averaging"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}
