"""FedDyn (Acar et al. 2021, ICLR, arXiv 2111.04263, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Gt
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector

__all__ = ["FedDyn"]


@final
@dataclass(frozen=True)
class FedDyn(Strategy):
    """Clients descend fₖ(w) − ⟨gₖ, w⟩ + α/2 ‖w − w_sent‖²: the regulariser follows each client's own gradient gₖ.

    ::

        client:  w ← w − η (∇fₖ(w) − gₖ + α (w − w_sent)),   gₖ⁺ = gₖ − α Δₖ
        server:  h ← h − α Σ Δₖ / population,                w ← w + mean Δₖ − h / α

    Use it on heterogeneous clients that come back: its fixed point is the optimum whatever the number of local steps.
    Clients weigh the same, as in the paper, which tunes α in {0.1, 0.01, 0.001}.

    Costs FedAvg's bytes, one model of state per client and one of server state.
    """

    alpha: Annotated[float, Gt(0)] = 0.01

    citation = "Acar et al. 2021, ICLR, Algorithm 1"
    family = "client drift"

    def init(self, parameters: Tensor) -> State:
        return {"parameters": parameters, "correction": torch.zeros_like(parameters)}

    def init_client(self, parameters: Tensor) -> Mine:
        return {"gradient": torch.zeros_like(parameters)}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        gradient = mine["gradient"]
        update = trainer.run(sent.parameters, drift=lambda w: self.alpha * (w - sent.parameters) - gradient)
        return update, {"gradient": gradient - self.alpha * update.delta}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return {"delta": update.delta}

    def finish(self, state: State, total: Terms, context: Context) -> State:
        delta = vector(total, "delta")
        correction = vector(state, "correction") - self.alpha * delta / context.population
        step = delta / context.counted - correction / self.alpha
        return {"parameters": vector(state, "parameters") + step, "correction": correction}
