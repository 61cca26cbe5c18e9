"""FedBABU (Oh, Kim and Yun 2022, ICLR, arXiv 2106.06042, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge
from torch import Tensor

from shoal.strategies import sharing
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedBABU"]


@final
@dataclass(frozen=True)
class FedBABU(Strategy):
    """Clients train and average the body before a head that stays as it was at first; for itself each fine-tunes.

    Use it where every client will fine-tune anyway: one random head for all keeps their bodies comparable. ``head``
    names the tensors that stay (patterns such as ``"fc.*"``); by default the last layer. The paper fine-tunes for 5 to
    20 epochs.

    Costs nothing beyond FedAvg in a round, and ``finetune_epochs`` passes where a client is evaluated.
    """

    head: tuple[str, ...] = ()
    finetune_epochs: Annotated[int, Ge(0)] = 5
    weighting: Weighting = "examples"

    citation = "Oh, Kim and Yun 2022, ICLR, Algorithm 1"
    family = "personalisation"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        head = sharing.head(trainer.layout, self.head, sent.parameters)
        return trainer.run(sent.parameters, mask=~head), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        if not self.finetune_epochs:
            return sent.parameters
        return sent.parameters + trainer.run(sent.parameters, epochs=self.finetune_epochs).delta
