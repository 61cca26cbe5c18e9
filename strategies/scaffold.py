"""SCAFFOLD (Karimireddy et al. 2020, ICML, arXiv 1910.06378, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, final

import torch
from annotated_types import Gt
from torch import Tensor

from shoal.protos.errors import InvalidUpdate
from shoal.strategies.base import Context, LocalOptimizer, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector

__all__ = ["Scaffold"]


@final
@dataclass(frozen=True)
class Scaffold(Strategy):
    """w ← w − η (gₖ(w) − cₖ + c): control variates c and cₖ cancel the drift of local steps.

    ::

        client:  w ← w − η (gₖ(w) − cₖ + c)
                 option 2:  cₖ⁺ = cₖ − c − Δₖ / Σ η       option 1:  cₖ⁺ = ∇fₖ(w_sent)
        server:  w ← w + η_g mean Δₖ,            c ← c + (counted / population) mean (cₖ⁺ − cₖ)

    Use it on heterogeneous clients that come back. Clients weigh the same, as in the paper. Option 2 is valid for plain
    SGD only: cₖ⁺ is the mean gradient of the local steps only if a step is lr × gradient. Option 1 takes any optimizer.

    Costs twice FedAvg's bytes both ways and one model of state per client; option 1 a pass over all local examples.
    """

    server_lr: Annotated[float, Gt(0)] = 1.0
    option: Literal[1, 2] = 2

    citation = "Karimireddy et al. 2020, ICML, Algorithm 1"
    family = "client drift"

    def init(self, parameters: Tensor) -> State:
        return {"parameters": parameters, "control": torch.zeros_like(parameters)}

    def init_client(self, parameters: Tensor) -> Mine:
        return {"control": torch.zeros_like(parameters)}

    def send(self, state: State) -> Sent:
        return Sent(vector(state, "parameters"), {"control": vector(state, "control")})

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        control, own = sent.tensors["control"], mine["control"]
        update = trainer.run(sent.parameters, drift=control - own)
        if self.option == 1:
            new = trainer.gradient(sent.parameters)
            return replace(update, tensors={"control": new - own}), {"control": new}
        if not isinstance(update.lr_sum, Tensor) and not update.lr_sum > 0:
            raise InvalidUpdate("SCAFFOLD needs at least one step with its learning rate to estimate a gradient")
        new = own - control - update.delta / update.lr_sum
        return replace(update, tensors={"control": new - own}), {"control": new}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return {"delta": update.delta, "control": update.tensors["control"]}

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {
            "parameters": vector(state, "parameters") + self.server_lr * vector(total, "delta") / context.counted,
            "control": vector(state, "control") + vector(total, "control") / context.population,
        }

    def refuses(self, local: LocalOptimizer) -> str | None:
        if self.option == 2 and (local.optimizer != "sgd" or local.momentum or local.clip is not None):
            return "its control variates are mean gradients only under plain SGD (no momentum, no clipping)"
        return None
