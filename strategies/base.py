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
from types import EllipsisType
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from shoal.protos import messages
from shoal.protos.messages import Spec
from shoal.protos.parameters import Layout
from shoal.strategies.kernels import settle

__all__ = [
    "Batch",
    "Context",
    "Drift",
    "Family",
    "Gradient",
    "LocalOptimizer",
    "Loss",
    "Mine",
    "Scaled",
    "Sent",
    "Slope",
    "State",
    "Strategy",
    "Terms",
    "Trainer",
    "Update",
    "number",
    "vector",
]

settle()  # whoever computes has imported this

Sent = messages.Sent[Tensor]
Update = messages.Update[Tensor]
State = Mapping[str, Tensor | float]  # the server's, between rounds
Mine = Mapping[str, Tensor]  # a client's own, between its rounds
Part = int | slice | EllipsisType  # whose rows of a block; ... where there is one client
Drift = Tensor | Callable[[Tensor], Tensor]
Family = Literal["averaging", "server optimizer", "client drift", "personalisation"]


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
    def nesterov(self) -> bool: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def weight_decay(self) -> float: ...


class Slope(Protocol):
    """The gradient of one batch: ``at(p)`` is that at the parameters p, for one client ``[P]`` or some ``[k, P]``.

    ``size`` is the number of examples in (each client's) batch, ``part`` says which clients of the block take this
    step: ``own[at.part]`` are theirs of the rows of ``own``, be it a block or one client's vector.
    """

    @property
    def size(self) -> int: ...
    @property
    def part(self) -> Part: ...

    def __call__(self, at: Tensor, rows: slice = slice(None)) -> Tensor:
        """The gradient of the mean loss, over these ``rows`` of the batch."""
        ...


class Batch(Protocol):
    """One client's batch, as a strategy's own loss sees it.

    ``labels`` are those of all the client's examples, ``part`` is as in a :class:`Slope`.
    """

    @property
    def y(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def part(self) -> Part: ...
    @property
    def output(self) -> Tensor:
        """Of the model that is trained."""
        ...

    @property
    def features(self) -> Tensor:
        """What its last dense layer takes, ``[n, D]``."""
        ...

    def features_at(self, parameters: Tensor) -> Tensor:
        """The same of a model with other parameters ``[P]``, as in evaluation and not to be trained.

        Its buffers are those of the model that is trained: BatchNorm's statistics are not the other model's.
        """
        ...

    def loss(self, output: Tensor) -> Tensor:
        """The declared loss."""
        ...


Gradient = Callable[[Slope, Tensor], Tensor]
Loss = Callable[[Batch], Tensor]


class Trainer(Protocol):
    """What an engine supplies to :meth:`Strategy.local`, for one client ``[P]`` or a block ``[K, P]``.

    ``layout`` names the parts of a vector; ``lr`` is the round's learning rate.
    """

    @property
    def layout(self) -> Layout: ...
    @property
    def lr(self) -> float: ...
    def run(
        self,
        start: Tensor,
        *,
        drift: Drift | None = None,
        gradient: Gradient | None = None,
        loss: Loss | None = None,
        mask: Tensor | None = None,
        epochs: int | None = None,
    ) -> Update:
        """Train from ``start`` as the experiment's local training says.

        ``drift`` (a vector, or a function of the current vector) is added to every batch gradient, before clipping
        and before the optimizer sees it. ``gradient`` makes the batch gradient: a function of the :class:`Slope` and
        the current vector, which may ask for the slope at several points. ``loss`` replaces the declared loss of a
        batch. Where ``mask`` ``[P]`` is False, parameters stay as they are. ``epochs`` replaces the declared amount of
        work. Drifts and masks keep the fastest engines; with a loss of its own a block is trained client by client.
        """
        ...

    def loss(self, at: Tensor) -> Tensor:
        """The mean loss over all local examples, a scalar (``[K, 1]`` for a block)."""
        ...

    def gradient(self, at: Tensor) -> Tensor:
        """The gradient of :meth:`loss`, shaped as ``at``."""
        ...


class Strategy(ABC):
    """One algorithm. Subclasses are final: to vary a strategy, write another one from the same functions.

    With ``own_buffers`` the model's buffers (BatchNorm's statistics) stay with each client instead of being averaged.
    """

    citation: ClassVar[str]
    family: ClassVar[Family] = "averaging"
    own_buffers: ClassVar[bool] = False

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

    def personal(self, trainer: Trainer, sent: Sent, mine: Mine) -> Tensor:
        """The vector ``[P]`` to evaluate for a client that holds ``mine``: the global model by default."""
        return sent.parameters

    @property
    def personalises(self) -> bool:
        """Whether clients have models of their own."""
        return type(self).personal is not Strategy.personal or self.own_buffers

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
