"""APFL (Deng, Kamani and Mahdavi 2020, arXiv 2003.13461, Algorithm 1 and Equation 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Le
from torch import Tensor

from shoal.strategies.base import (
    Context,
    LocalOptimizer,
    Mine,
    Sent,
    Slope,
    State,
    Strategy,
    Terms,
    Trainer,
    Update,
    vector,
)
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["APFL"]


@final
@dataclass(frozen=True)
class APFL(Strategy):
    """A client's own model is the mixture v̄ = α v + (1 − α) w of a local v and FedAvg's w, trained side by side.

    ::

        w ← w − η ∇fₖ(w)        v ← v − η α ∇fₖ(v̄)        α ← α − η ⟨v − w, ∇fₖ(v̄)⟩, between 0 and 1

    Use it where it is not known how much clients have in common: with ``adapt`` each finds its own α. The paper begins
    with α = ½. Both models see the same batches. v takes plain SGD steps.

    Costs one model of state per client and twice the gradients.
    """

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    adapt: bool = True
    weighting: Weighting = "examples"

    citation = "Deng, Kamani and Mahdavi 2020, arXiv 2003.13461, Algorithm 1"
    family = "personalisation"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters, "alpha": parameters.new_full((1,), self.alpha)}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        model, alpha = mine["model"].clone(), mine["alpha"].clone()

        def gradient(at: Slope, w: Tensor) -> Tensor:
            g, v, a = at(w), model[at.part], alpha[at.part]
            mixed = at(a * v + (1 - a) * w)
            pull = ((v - w) * mixed).sum(-1, keepdim=True) if self.adapt else 0.0
            model[at.part], alpha[at.part] = v - trainer.lr * a * mixed, (a - trainer.lr * pull).clamp(0, 1)
            return g

        update = trainer.run(sent.parameters, gradient=gradient)
        return update, {"model": model, "alpha": alpha}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return mine["alpha"] * mine["model"] + (1 - mine["alpha"]) * sent.parameters

    def refuses(self, local: LocalOptimizer) -> str | None:
        if local.optimizer != "sgd" or local.momentum or local.weight_decay or local.clip is not None:
            return "its two models take the same plain SGD steps (no momentum, decay or clipping)"
        return None
