"""A trainer whose every number is known in closed form, and the shortest round loop: the library's own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.protos.parameters import Entry, Layout, Segment
from shoal.strategies.base import Context, Drift, Gradient, Loss, Mine, State, Strategy, Update, vector
from shoal.strategies.sums import LeafSum, contribute


@dataclass(frozen=True)
class Quadratic:
    """Gradient descent on F(x) = ½ (x − e)ᵀ diag(h) (x − e): one client ``[P]``, or a block ``[K, P]``.

    In a block every number is a tensor ``[K, 1]`` of float64; an update carries it in the dtype of the vectors.
    ``steps`` is the declared work and is taken once an epoch. Products and sums stand apart (no ``alpha=``), so no
    fused multiply-add makes the bits depend on the shape.
    """

    h: Tensor
    e: Tensor
    examples: float | Tensor = 1.0
    steps: int | Tensor = 1
    lr: Any = 0.1

    @property
    def layout(self) -> Layout:
        """A normalised body and a head of one weight."""
        parts = [("body.weight", self.h.shape[-1] - 1), ("head.weight", 1)]
        entries = [Entry(name, Segment.TRAINABLE, "float64", (size,)) for name, size in parts]
        return Layout((*entries, Entry("body.running_mean", Segment.BUFFERS, "float64", (1,))))

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
        assert loss is None, "it has no batches"

        def number(value: float | Tensor) -> float | Tensor:
            return value.to(start.dtype) if isinstance(value, Tensor) else value

        steps = self.steps * (1 if epochs is None else epochs)
        w = start.expand_as(self.h).clone()
        for step in range(int(torch.as_tensor(steps).max())):
            going = torch.as_tensor(step < steps)
            g = self.gradient(w) if gradient is None else self._made(gradient, w, going)
            if drift is not None:
                g = g + (drift(w) if callable(drift) else drift)
            moved = w - number(self.lr) * g
            w = torch.where(going, moved if mask is None else torch.where(mask, moved, start), w)
        return Update(w - start, number(self.examples), number(steps), number(steps * self.lr))

    def _made(self, gradient: Gradient, w: Tensor, going: Tensor) -> Tensor:
        part: Any = going.flatten().nonzero().flatten() if w.dim() > 1 else ...
        made = torch.zeros_like(w)
        made[part] = gradient(Slope(self, part), w[part])
        return made

    def loss(self, at: Tensor) -> Tensor:
        value = (self.h * (at - self.e) ** 2 / 2).sum(-1, keepdim=True)
        return value if self.h.dim() > 1 else value.squeeze(-1)

    def gradient(self, at: Tensor) -> Tensor:
        return self.h * (at - self.e)


@dataclass(frozen=True)
class Slope:
    """The gradient of those who take this step; all rows of a batch are alike."""

    of: Quadratic
    part: Any
    size: int = 10

    def __call__(self, at: Tensor, rows: slice = slice(None)) -> Tensor:
        assert range(self.size)[rows]
        return self.of.h[self.part] * (at - self.of.e[self.part])


def together(clients: Sequence[Quadratic]) -> Quadratic:
    """The clients as one block."""
    numbers: dict[str, Any] = {
        name: torch.tensor([[getattr(c, name)] for c in clients], dtype=torch.float64)
        for name in ("examples", "steps", "lr")
    }
    if len({c.lr for c in clients}) == 1:  # as in a round
        numbers["lr"] = clients[0].lr
    return Quadratic(torch.stack([c.h for c in clients]), torch.stack([c.e for c in clients]), **numbers)


def apart(update: Update, count: int) -> list[Update]:
    """The updates of a block's clients, their numbers numbers again."""

    def row(value: Tensor | float, i: int) -> float:
        assert isinstance(value, Tensor)
        return float(value[i])

    return [
        replace(
            update,
            delta=update.delta[i],
            examples=row(update.examples, i),
            steps=row(update.steps, i),
            lr_sum=row(update.lr_sum, i),
            tensors={name: value[i] for name, value in update.tensors.items()},
        )
        for i in range(count)
    ]


def train(
    strategy: Strategy, clients: Sequence[Quadratic], state: State, mine: Sequence[Mine], block: bool
) -> list[tuple[Update, Mine]]:
    """The client half for a cohort, one at a time or as one block."""
    sent = strategy.send(state)
    if not block:
        return [strategy.local(client, sent, own) for client, own in zip(clients, mine, strict=True)]
    stacked = {name: torch.stack([own[name] for own in mine]) for name in mine[0]}
    update, new = strategy.local(together(clients), sent, stacked)
    return [(one, {name: t[i] for name, t in new.items()}) for i, one in enumerate(apart(update, len(clients)))]


def run_rounds(
    strategy: Strategy,
    clients: Sequence[Quadratic],
    rounds: int,
    *,
    cohorts: Sequence[Sequence[int]] | None = None,
    block: bool = False,
    state: State | None = None,
    mine: Sequence[Mine] | None = None,
) -> tuple[State, list[Mine]]:
    """The last state and what each client holds; everyone takes part unless ``cohorts`` says who does."""
    zero = torch.zeros_like(clients[0].h)
    state = strategy.init(zero) if state is None else state
    kept = [strategy.init_client(zero) for _ in clients] if mine is None else list(mine)
    for number in range(rounds):
        cohort = range(len(clients)) if cohorts is None else cohorts[number]
        context = Context(number, population=len(clients), asked=len(cohort))
        replies = train(strategy, [clients[i] for i in cohort], state, [kept[i] for i in cohort], block)
        sum_ = LeafSum()
        for position, (i, (update, new)) in enumerate(zip(cohort, replies, strict=True)):
            sum_.add(position, contribute(strategy, state, update, context))
            kept[i] = new
        total = sum_.total()
        assert total is not None
        state = strategy.finish(state, total.terms, replace(context, counted=total.counted))
    return state, kept


@pytest.fixture(scope="session")
def quadratic() -> type[Quadratic]:
    """``quadratic(h, e, examples, steps, lr)``: a trainer."""
    return Quadratic


@pytest.fixture(scope="session")
def block() -> Callable[[Sequence[Quadratic]], Quadratic]:
    """``block(clients)``: one trainer for all of them."""
    return together


@pytest.fixture(scope="session")
def simulate() -> Callable[..., tuple[State, list[Mine]]]:
    """``simulate(strategy, clients, rounds, cohorts=…, block=…, state=…, mine=…)``: last state, clients' own states."""
    return run_rounds


@pytest.fixture(scope="session")
def quadratics() -> Callable[..., list[Quadratic]]:
    """``quadratics(count, size)``: unequal clients, drawn once for all."""

    def draw(count: int, size: int = 5, dtype: torch.dtype = torch.float64) -> list[Quadratic]:
        rng = torch.Generator().manual_seed(count)
        return [
            Quadratic(
                (torch.rand(size, generator=rng, dtype=torch.float64) + 0.5).to(dtype),
                torch.randn(size, generator=rng, dtype=torch.float64).to(dtype),
                examples=float(torch.randint(1, 50, (), generator=rng)),
                steps=int(torch.randint(1, 6, (), generator=rng)),
            )
            for _ in range(count)
        ]

    return draw


@pytest.fixture(scope="session")
def bits() -> Callable[[Mapping[str, Tensor | float]], dict[str, bytes | float]]:
    """``bits(state)``: the bytes of every vector, so that ``==`` means bit for bit (−0.0 is not 0.0)."""

    def of(values: Mapping[str, Tensor | float]) -> dict[str, bytes | float]:
        return {
            name: vector(values, name).numpy().tobytes() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }

    return of
