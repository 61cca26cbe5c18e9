"""FedExP (Jhunjhunwala, Wang and Joshi 2023, ICLR, arXiv 2301.09604, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Terms, Trainer, Update, number, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedExP"]


@final
@dataclass(frozen=True)
class FedExP(Strategy):
    """w ← w + η_g Δ̄ with η_g = max(1, Σ pₖ ‖Δₖ‖² / (2 (‖Δ̄‖² + ε))), Δ̄ = Σ pₖ Δₖ.

    Use it where FedAvg is slow because clients pull in different directions: the server's step grows with their
    disagreement, and nothing needs tuning. The paper weighs clients equally and tunes ε in {10⁻³ … 10⁻¹}; it reports
    the average of the last two models, since single ones oscillate.

    Costs nothing beyond FedAvg.
    """

    epsilon: Annotated[float, Ge(0)] = 1e-3
    weighting: Weighting = "uniform"

    citation = "Jhunjhunwala et al. 2023, ICLR, Algorithm 1"
    family = "server optimizer"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        mean = WeightedMean(self.weighting)
        return {**mean.contribute(update), "squares": mean.weight(update) * _square(update.delta)}

    def finish(self, state: State, total: Terms, context: Context) -> State:
        delta = WeightedMean.finish(total)
        squares, square = number(total, "squares") / number(total, "weight"), float(_square(delta))
        lr = max(1.0, squares / (2 * (square + self.epsilon))) if square + self.epsilon > 0 else 1.0
        return {"parameters": vector(state, "parameters") + lr * delta}


def _square(vectors: Tensor) -> Tensor | float:
    """The squared norm of a vector ``[P]``, or of each in a block as ``[K, 1]``."""
    squares = vectors.double().square().sum(dim=-1, keepdim=True)
    return squares if vectors.dim() > 1 else float(squares)
