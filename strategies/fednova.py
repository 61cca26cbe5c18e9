"""FedNova (Wang et al. 2020, NeurIPS, arXiv 2007.07481, Section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, final

from annotated_types import Ge, Lt
from torch import Tensor

from shoal.protos.errors import InvalidUpdate
from shoal.strategies.base import (
    Context,
    LocalOptimizer,
    Mine,
    Scaled,
    Sent,
    State,
    Strategy,
    Terms,
    Trainer,
    Update,
    number,
    vector,
)
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["FedNova"]


@final
@dataclass(frozen=True)
class FedNova(Strategy):
    """w ← w + τ_eff Σ pₖ Δₖ / ‖aₖ‖₁ with τ_eff = Σ pₖ ‖aₖ‖₁: normalised averaging.

    ::

        plain SGD, τ steps:          ‖a‖₁ = τ
        heavy-ball momentum ρ:       ‖a‖₁ = (τ − ρ (1 − ρ^τ) / (1 − ρ)) / (1 − ρ)

    Use it where clients do unequal numbers of steps: FedAvg then optimises another objective than the one declared. It
    is FedAvg where all do the same work. ``momentum`` is that of the local training: a and Δ must belong together.

    Costs nothing beyond FedAvg.
    """

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    weighting: Weighting = "examples"

    citation = "Wang et al. 2020, NeurIPS, Section 4"
    family = "client drift"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        return trainer.run(sent.parameters), mine

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        if isinstance(update.steps, float | int) and not update.steps >= 1:
            raise InvalidUpdate(f"FedNova divides by the number of steps, and a client made {update.steps:g}")
        weight, work = WeightedMean(self.weighting).weight(update), self._work(update.steps)
        return {"delta": Scaled(update.delta, weight / work), "weight": weight, "work": weight * work}

    def _work(self, steps: Any) -> Any:
        """‖a‖₁, in double precision."""
        rho, steps = self.momentum, steps.double() if isinstance(steps, Tensor) else steps
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        mean = WeightedMean.finish(total)
        effective = number(total, "work") / number(total, "weight")
        return {"parameters": vector(state, "parameters") + effective * mean}

    def refuses(self, local: LocalOptimizer) -> str | None:
        if local.optimizer != "sgd" or local.clip is not None:
            return "its normalisation is known for SGD only (without clipping)"
        if local.nesterov:
            return "its normalisation is that of heavy-ball momentum, not of Nesterov's"
        if local.momentum != self.momentum:
            return f"its momentum {self.momentum:g} must be that of local training, {local.momentum:g}"
        return None
