"""FedBN (Li et al. 2021, ICLR, arXiv 2102.07623, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from shoal.strategies import sharing
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedBN"]


@final
@dataclass(frozen=True)
class FedBN(Strategy):
    """FedAvg of all but batch normalisation: its weights, biases and statistics stay with each client.

    Use it where clients' inputs differ in kind (scanners, cameras, sites) and labels mean the same. The global model
    keeps the normalisation that it had at first, so look at the clients' own.

    Costs one model of state per client. What stays leaves zeros in its place in an update.
    """

    weighting: Weighting = "examples"

    citation = "Li et al. 2021, ICLR, Algorithm 1"
    family = "personalisation"
    own_buffers = True

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        shared = self._shared(trainer, sent)
        start = torch.where(shared, sent.parameters, mine["model"])
        update = trainer.run(start)
        return sharing.kept_to(shared, update), {"model": start + update.delta}

    def _shared(self, trainer: Trainer, sent: Sent) -> Tensor:
        return ~sharing.mask(trainer.layout, sharing.norms(trainer.layout), sent.parameters)

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return torch.where(self._shared(trainer, sent), sent.parameters, mine["model"])
