"""FedAvg with local fine-tuning (Cheng, Chadha and Duchi 2021, arXiv 2108.07313, calls it FTFA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Gt
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FineTune"]


@final
@dataclass(frozen=True)
class FineTune(Strategy):
    """FedAvg; for itself each client trains the global model some epochs more on its own examples.

    Use it before any other kind of personalisation: it is the baseline that these must beat.

    Costs nothing beyond FedAvg in a round, and ``epochs`` passes where a client is evaluated.
    """

    epochs: Annotated[int, Gt(0)] = 1
    weighting: Weighting = "examples"

    citation = "Cheng, Chadha and Duchi 2021, arXiv 2108.07313"
    family = "personalisation"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return sent.parameters + trainer.run(sent.parameters, epochs=self.epochs).delta
