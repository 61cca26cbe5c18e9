"""FedLC (Zhang et al. 2022, ICML, arXiv 2209.00189)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge
from torch import Tensor

from shoal.protos.errors import ExperimentError
from shoal.strategies.base import Batch, Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedLC"]


@final
@dataclass(frozen=True)
class FedLC(Strategy):
    """Clients lower their logits by τ nᵧ^{−1/4}, for the nᵧ examples that they have of class y.

    Use it on skewed labels: what a client has little of must win by a margin, and what it has none of is left out of
    its softmax, so that it is not unlearned. Takes class numbers. The calibrated logits go into the declared
    cross-entropy, whose denominator has all classes. τ = 0 is FedAvg, bit for bit.

    Costs nothing on the wire; its loss keeps clients out of blocks.
    """

    tau: Annotated[float, Ge(0)] = 1.0
    weighting: Weighting = "examples"

    citation = "Zhang et al. 2022, ICML, arXiv 2209.00189"
    family = "client drift"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        if not self.tau:
            return trainer.run(sent.parameters), mine
        return trainer.run(sent.parameters, loss=self._calibrated), mine

    def _calibrated(self, batch: Batch) -> Tensor:
        if batch.labels.is_floating_point() or batch.labels.dim() > 1:
            raise ExperimentError("FedLC counts classes, so labels must be class numbers; take another strategy")
        counts = batch.labels.bincount(minlength=batch.output.shape[1])
        return batch.loss(batch.output - self.tau * counts.to(batch.output) ** -0.25)

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}
