"""LG-FedAvg (Liang et al. 2020, arXiv 2001.01523, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from shoal.strategies import sharing
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["LgFedAvg"]


@final
@dataclass(frozen=True)
class LgFedAvg(Strategy):
    """Each client keeps a representation of its own; only the head on top of it is averaged.

    Use it where clients see different things, such as sensors of several kinds, and mean the same by them. ``head``
    names the tensors that are shared (patterns such as ``"fc.*"``); by default the last layer. It is FedPer the other
    way round; the paper lets FedAvg find the first model.

    Costs one model of state per client. What stays leaves zeros in its place in an update.
    """

    head: tuple[str, ...] = ()
    weighting: Weighting = "examples"

    citation = "Liang et al. 2020, arXiv 2001.01523, Algorithm 1"
    family = "personalisation"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        head = self._head(trainer, sent)
        start = torch.where(head, sent.parameters, mine["model"])
        update = trainer.run(start)
        return sharing.kept_to(head, update), {"model": start + update.delta}

    def _head(self, trainer: Trainer, sent: Sent) -> Tensor:
        return sharing.head(trainer.layout, self.head, sent.parameters)

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return torch.where(self._head(trainer, sent), sent.parameters, mine["model"])
