"""MimeLite with SGD and momentum (Karimireddy et al. 2021, NeurIPS, arXiv 2008.03606, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, final

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from shoal.protos.messages import Spec
from shoal.strategies.base import (
    Context,
    LocalOptimizer,
    Mine,
    Sent,
    State,
    Strategy,
    Terms,
    Trainer,
    Update,
    spec,
    vector,
)

__all__ = ["MimeLite"]


@final
@dataclass(frozen=True)
class MimeLite(Strategy):
    """Clients take the steps of momentum SGD with the server's momentum m, which stays as it is while they train.

    ::

        client:  w ← w − η (g + β/(1 − β) m)
        server:  w ← w + mean Δₖ,        m ← β m + (1 − β) mean ∇fₖ(w_sent)

    Use it where server momentum helps and clients drift: the momentum acts in every local step. The paper's learning
    rate is η / (1 − β), its step (1 − β) g + β m. β = 0 is FedAvg with equal weights. Clients weigh the same, as in the
    paper, where Mime goes on to correct g as SVRG does, which takes two trips a round and is not offered.

    Costs twice FedAvg's bytes both ways, one model of server state and a pass over all local examples.
    """

    beta: Annotated[float, Ge(0), Lt(1)] = 0.9

    citation = "Karimireddy et al. 2021, NeurIPS, Algorithm 1"
    family = "client drift"

    def init(self, parameters: Tensor) -> State:
        return {"parameters": parameters, "momentum": torch.zeros_like(parameters)}

    def send(self, state: State) -> Sent:
        return Sent(vector(state, "parameters"), {"momentum": vector(state, "momentum")})

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        update = trainer.run(sent.parameters, drift=self.beta / (1 - self.beta) * sent.tensors["momentum"])
        return replace(update, tensors={"gradient": trainer.gradient(sent.parameters)}), mine

    def reply(self, sent: Sent) -> Mapping[str, Spec]:
        return {"gradient": spec(sent.parameters)}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return {"delta": update.delta, "gradient": update.tensors["gradient"]}

    def finish(self, state: State, total: Terms, context: Context) -> State:
        mean = vector(total, "gradient") / context.counted
        return {
            "parameters": vector(state, "parameters") + vector(total, "delta") / context.counted,
            "momentum": self.beta * vector(state, "momentum") + (1 - self.beta) * mean,
        }

    def refuses(self, local: LocalOptimizer) -> str | None:
        if local.optimizer != "sgd" or local.momentum:
            return "its momentum is the server's, over plain SGD"
        if local.weight_decay:
            return "its momentum is of the loss alone, beside which weight decay would count (1 − β) times"
        return None
