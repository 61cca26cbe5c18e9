"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818, Section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from shoal.strategies import sharing
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedPer"]


@final
@dataclass(frozen=True)
class FedPer(Strategy):
    """Clients average the body of the model; each keeps a head of its own, and trains both together.

    Use it where clients see like things and call them differently: other classes, other labels. ``head`` names the
    tensors that stay (patterns such as ``"fc.*"``); by default the last layer.

    Costs one model of state per client. The head's values never leave it; its place in an update holds zeros.
    """

    head: tuple[str, ...] = ()
    weighting: Weighting = "examples"

    citation = "Arivazhagan et al. 2019, arXiv 1912.00818, Section 3"
    family = "personalisation"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        body = self._body(trainer, sent)
        start = torch.where(body, sent.parameters, mine["model"])
        update = trainer.run(start)
        return sharing.kept_to(body, update), {"model": start + update.delta}

    def _body(self, trainer: Trainer, sent: Sent) -> Tensor:
        return ~sharing.head(trainer.layout, self.head, sent.parameters)

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return torch.where(self._body(trainer, sent), sent.parameters, mine["model"])
