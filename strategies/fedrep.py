"""FedRep (Collins et al. 2021, ICML, arXiv 2102.07078, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Gt
from torch import Tensor

from shoal.strategies import sharing
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedRep"]


@final
@dataclass(frozen=True)
class FedRep(Strategy):
    """Each client first fits a head of its own to the shared body, then takes one pass on the body before that head.

    Use it where clients see like things and call them differently, and have data enough for a head: the body moves
    only for heads that fit. ``head`` names the tensors that stay (patterns such as ``"fc.*"``); by default the last
    layer. The paper takes 10 epochs for the head and one for the body, which here is the declared local training.

    Costs one model of state per client and ``head_epochs`` more passes. The head's values never leave it; its place in
    an update holds zeros.
    """

    head: tuple[str, ...] = ()
    head_epochs: Annotated[int, Gt(0)] = 10
    weighting: Weighting = "examples"

    citation = "Collins et al. 2021, ICML, Algorithm 1"
    family = "personalisation"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        body = self._body(trainer, sent)
        start = torch.where(body, sent.parameters, mine["model"])
        start = start + trainer.run(start, mask=~body, epochs=self.head_epochs).delta
        update = trainer.run(start, mask=body)
        return update, {"model": start + update.delta}

    def _body(self, trainer: Trainer, sent: Sent) -> Tensor:
        return ~sharing.head(trainer.layout, self.head, sent.parameters)

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return torch.where(self._body(trainer, sent), sent.parameters, mine["model"])
