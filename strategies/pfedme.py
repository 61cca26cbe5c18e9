"""pFedMe (T. Dinh, Tran and Nguyen 2020, NeurIPS, arXiv 2006.08848, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Gt
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

__all__ = ["PFedMe"]


@final
@dataclass(frozen=True)
class PFedMe(Strategy):
    """Clients descend the Moreau envelope of their loss: w ← w − η λ (w − θ) with θ ≈ argmin fₖ(θ) + λ/2 ‖θ − w‖².

    ::

        θ:       inner_steps of  θ ← θ − inner_lr (∇fₖ(θ) + λ (θ − w))  on the batch, from w
        server:  w ← (1 − β) w + β mean wₖ

    Use it where clients differ and come back: each is evaluated on its own θ, which λ ties to the global model. The
    learning rate η is that of the local training. The paper takes λ = 15, five inner steps and β between 1 and 2, and
    weighs clients equally.

    Costs one model of state per client and ``inner_steps`` gradients for each step.
    """

    lam: Annotated[float, Gt(0)] = 15.0
    inner_steps: Annotated[int, Gt(0)] = 5
    inner_lr: Annotated[float, Gt(0)] = 0.05
    beta: Annotated[float, Gt(0)] = 1.0
    weighting: Weighting = "uniform"

    citation = "T. Dinh, Tran and Nguyen 2020, NeurIPS, Algorithm 1"
    family = "personalisation"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        own = mine["model"].clone()

        def gradient(at: Slope, w: Tensor) -> Tensor:
            theta = w
            for _ in range(self.inner_steps):
                theta = theta - self.inner_lr * (at(theta) + self.lam * (theta - w))
            own[at.part] = theta
            return self.lam * (w - theta)

        return trainer.run(sent.parameters, gradient=gradient), {"model": own}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + self.beta * WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return mine["model"]

    def refuses(self, local: LocalOptimizer) -> str | None:
        if local.optimizer != "sgd" or local.momentum or local.weight_decay or local.clip is not None:
            return "its step is η λ (w − θ), which another optimizer, momentum, decay or clipping would change"
        return None
