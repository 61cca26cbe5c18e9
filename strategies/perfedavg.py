"""Per-FedAvg (Fallah, Mokhtari and Ozdaglar 2020, NeurIPS, arXiv 2002.07948, Algorithm 1 and Section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, final

from annotated_types import Gt
from torch import Tensor

from shoal.strategies.base import Context, Mine, Sent, Slope, State, Strategy, Terms, Trainer, Update, vector
from shoal.strategies.mean import WeightedMean, Weighting

__all__ = ["PerFedAvg"]


@final
@dataclass(frozen=True)
class PerFedAvg(Strategy):
    """Clients descend fₖ(w − α ∇fₖ(w)), the loss that they will have after one gradient step of their own.

    ::

        first-order:   ∇fₖ(w − α ∇fₖ(w; D); D')
        hessian-free:  g − α [∇fₖ(w + δ g; D″) − ∇fₖ(w − δ g; D″)] / (2 δ),  with g as above

    Use it where clients adapt by a step or two with few examples. D, D' and D″ are parts of the batch, since the paper
    wants them independent: a batch should hold some examples (BatchNorm wants two in each part). A client's own model
    is one step of α from the global one, over all its examples. The paper takes α = 0.01 and weighs clients equally;
    MAML with its Hessian is not offered, since the paper finds ``hessian-free`` as good.

    Costs one gradient more of half a batch for each step, or two more of a third; a pass where a client is evaluated.
    """

    alpha: Annotated[float, Gt(0)] = 0.01
    variant: Literal["first-order", "hessian-free"] = "hessian-free"
    delta: Annotated[float, Gt(0)] = 1e-3
    weighting: Weighting = "uniform"

    citation = "Fallah, Mokhtari and Ozdaglar 2020, NeurIPS, Algorithm 1"
    family = "personalisation"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        make = self._first_order if self.variant == "first-order" else self._hessian_free
        return trainer.run(sent.parameters, gradient=make), mine

    def _first_order(self, at: Slope, w: Tensor) -> Tensor:
        inner, outer = parts(at.size, 2)
        return at(w - self.alpha * at(w, inner), outer)

    def _hessian_free(self, at: Slope, w: Tensor) -> Tensor:
        inner, outer, other = parts(at.size, 3)
        g = at(w - self.alpha * at(w, inner), outer)
        along = (at(w + self.delta * g, other) - at(w - self.delta * g, other)) / (2 * self.delta)
        return g - self.alpha * along

    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        return WeightedMean(self.weighting).contribute(update)

    def finish(self, state: State, total: Terms, context: Context) -> State:
        return {"parameters": vector(state, "parameters") + WeightedMean.finish(total)}

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        return sent.parameters - self.alpha * trainer.gradient(sent.parameters)


def parts(size: int, count: int) -> list[slice]:
    """The rows of a batch in so many parts, none of them empty: too small a batch gives some rows to several."""
    ends = [size * i // count for i in range(count + 1)]
    return [slice(min(start, size - 1), max(end, start + 1)) for start, end in pairwise(ends)]
