"""The shape of a strategy: one algorithm, both halves, in one file.

A strategy is a frozen dataclass of hyper-parameters plus functions. Its server state is a value, a flat mapping from
name to vector or number: a checkpoint is exactly that value. A round runs through it in one straight line::

    send(state) → local(trainer, sent, mine) → contribute(state, update, context) → Σ → finish(state, Σ, context)

Vectors are ``[P]`` for one client or ``[K, P]`` for a block of K; the same lines serve both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from shoal.protos import messages
from shoal.protos.messages import Spec

__all__ = [
    "Context",
    "Drift",
    "LocalOptimizer",
    "Mine",
    "Scaled",
    "Sent",
    "State",
    "Strategy",
    "Terms",
    "Trainer",
    "Update",
    "number",
    "vector",
]

Sent = messages.Sent[Tensor]
Update = messages.Update[Tensor]
State = Mapping[str, Tensor | float]  # the server's, between rounds
Mine = Mapping[str, Tensor]  # a client's own, between its rounds
Drift = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scaled:
    """A vector and the number it counts with: multiplied when it is added, so that no product is written to memory."""

    vector: Tensor
    by: Tensor | float


Terms = Mapping[str, Tensor | float | Scaled]  # what is summed over the cohort; a sum has vectors and numbers only


@dataclass(frozen=True)
class Context:
    """What the server knows about a round.

    ``counted`` (how many updates the sum holds) is known only in :meth:`Strategy.finish`; before, it is 0.
    ``staleness`` is the number of rounds since the update's base version.
    """

    round: int
    population: int
    asked: int
    counted: int = 0
    staleness: int = 0


class LocalOptimizer(Protocol):
    """What a strategy may ask about local training before it agrees to run with it."""

    @property
    def optimizer(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def clip(self) -> float | None: ...


class Trainer(Protocol):
    """What an engine supplies to :meth:`Strategy.local`, for one client ``[P]`` or a block ``[K, P]``."""

    def run(self, start: Tensor, *, drift: Drift | None = None, epochs: int | None = None) -> Update:
        """Train from ``start`` as the experiment's local training says.

        ``drift`` (a vector, or a function of the current vector) is added to every batch gradient, before clipping
        and before the optimizer sees it. ``epochs`` replaces the declared amount of work.
        """
        ...

    def loss(self, at: Tensor) -> Tensor:
        """The mean loss over all local examples, a scalar (``[K, 1]`` for a block)."""
        ...

    def gradient(self, at: Tensor) -> Tensor:
        """The gradient of :meth:`loss`, shaped as ``at``."""
        ...


class Strategy(ABC):
    """One algorithm. Subclasses are final: to vary a strategy, write another one from the same functions."""

    citation: ClassVar[str]

    def init(self, parameters: Tensor) -> State:
        """The server's state before the first round; the model ``[P]`` is always under ``"parameters"``."""
        return {"parameters": parameters}

    def init_client(self, parameters: Tensor) -> Mine:
        """A client's own state before its first task; ``parameters`` gives the shape."""
        return {}

    def send(self, state: State) -> Sent:
        """What every client of the cohort gets."""
        return Sent(vector(state, "parameters"))

    @abstractmethod
    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Update, Mine]:
        """The client half. The new ``mine`` takes effect only if the server counts the update."""

    def reply(self, sent: Sent) -> Mapping[str, Spec]:
        """The tensors that an update must bring beside its delta; as sent, unless a strategy says otherwise."""
        return {name: spec(tensor) for name, tensor in sent.tensors.items()}

    @abstractmethod
    def contribute(self, state: State, update: Update, context: Context) -> Terms:
        """What one update adds to the round's sum."""

    @abstractmethod
    def finish(self, state: State, total: Terms, context: Context) -> State:
        """The server half: the next state from the sum."""

    def personal(self, sent: Sent, mine: Mine) -> Tensor:
        """The vector to evaluate for a client that holds ``mine``: the global model by default."""
        return sent.parameters

    def refuses(self, local: LocalOptimizer) -> str | None:
        """Why this strategy is wrong with that local training, in one sentence; None if it is valid."""
        return None


def drift_at(drift: Drift, parameters: Tensor) -> Tensor:
    """A drift's vector at the current parameters."""
    return drift(parameters) if callable(drift) else drift


def spec(tensor: Tensor) -> Spec:
    """The tensor's dtype and shape as they are declared to a peer."""
    return Spec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def vector(values: State | Terms, name: str) -> Tensor:
    """A named vector of a state, a contribution or a sum; TypeError if it is a number."""
    value = values[name]
    if isinstance(value, Scaled):
        return value.vector * value.by
    if not isinstance(value, Tensor):
        raise TypeError(f"{name!r} is the number {value!r}, not a vector")
    return value


def number(values: State | Terms, name: str) -> float:
    """A named number of a state or a sum; TypeError if it is a vector."""
    value = values[name]
    if isinstance(value, Scaled) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{name!r} is a vector, not a number")
    return float(value)
