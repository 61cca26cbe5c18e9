"""MOON (Li, He and Song 2021, CVPR, arXiv 2103.16257, Equations 3 and 4, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional

from shoal.strategies.base import Batch, Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["Moon"]


@final
@dataclass(frozen=True)
class Moon(Strategy):
    """Clients descend fₖ + μ ℓ: features z are drawn to the global model's and away from those of their last own.

    ::

        ℓ = −log e^{cos(z, z_global)/T} / (e^{cos(z, z_global)/T} + e^{cos(z, z_last)/T})

    Use it on images with few clients that come back. Features are what the last dense layer takes; the paper puts a
    small network before it. Of the other two models it takes the weights, not BatchNorm's statistics. It takes T = 0.5
    and tunes μ in {0.1, 1, 5, 10}; μ = 0 is FedAvg, bit for bit.

    Costs one model of state per client and two more forward passes a step; its loss keeps clients out of blocks.
    """

    mu: Annotated[float, Ge(0)] = 1.0
    temperature: Annotated[float, Gt(0)] = 0.5
    weighting: Weighting = "examples"

    citation = "Li, He and Song 2021, CVPR, Algorithm 1"
    family = "client drift"

    def init_client(self, parameters: Tensor) -> Mine:
        return {"model": parameters}

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        def loss(batch: Batch) -> Tensor:
            near, far = batch.features_at(sent.parameters), batch.features_at(mine["model"][batch.part])
            closer, further = (functional.cosine_similarity(batch.features, z) for z in (near, far))
            return (
                batch.loss(batch.output) + self.mu * functional.softplus((further - closer) / self.temperature).mean()
            )

        update = trainer.run(sent.parameters, loss=loss if self.mu else None)
        return update, {"model": sent.parameters + update.delta}

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}
