"""The weighted mean: the aggregator of McMahan et al. 2017 (AISTATS), Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final

from torch import Tensor

from shoal.protos.errors import RoundError
from shoal.strategies.base import Scaled, Terms, Update, number, vector

__all__ = ["WeightedMean", "Weighting"]

Weighting = Literal["examples", "uniform"]


@final
@dataclass(frozen=True)
class WeightedMean:
    """Σ wₖ Δₖ / Σ wₖ with wₖ = nₖ (``"examples"``) or wₖ = 1 (``"uniform"``).

    Weighted by examples, the round optimises the mean loss over all examples; uniformly, the mean over clients.
    """

    weighting: Weighting = field(default="examples")

    def weight(self, update: Update) -> float | Tensor:
        """wₖ; for a block ``[K, 1]``."""
        return 1.0 if self.weighting == "uniform" else update.examples

    def contribute(self, update: Update) -> Terms:
        """One client's terms of the two sums."""
        if self.weighting == "uniform":
            return {"delta": update.delta, "weight": 1.0}
        return {"delta": Scaled(update.delta, update.examples), "weight": update.examples}

    @staticmethod
    def finish(total: Terms) -> Tensor:
        """The mean ``[P]``; RoundError if the weights sum to zero or less, or to no number."""
        weight = number(total, "weight")
        if not (math.isfinite(weight) and weight > 0):
            raise RoundError(
                f"the weights of the counted updates sum to {weight}; clients must report a positive number of "
                f"examples, or set strategy.weighting = 'uniform'"
            )
        return vector(total, "delta") / weight
