"""A fleet: where clients live. The coordinator asks, the fleet answers as results come.

There is one interface for clients simulated in this process, in worker processes and behind gRPC.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shoal.protos.messages import Failure, Update

if TYPE_CHECKING:  # PyTorch, for which a run of somebody else's app shall not wait
    from shoal.strategies.base import Context, State
    from shoal.strategies.sums import Carried, Contribution

__all__ = ["Ask", "Fleet", "Part", "Report", "Round"]


@dataclass(frozen=True)
class Ask:
    """One round's request. Positions in ``cohort`` fix the order of the sum.

    ``goal`` is how many updates the round needs: a fleet may stop there and withdraw the others. ``deadline`` is in
    seconds from the start; who has not answered by then has failed.
    """

    cohort: Sequence[str]
    goal: int
    state: State
    carried: Carried
    context: Context
    deadline: float | None = None


@dataclass(frozen=True)
class Report:
    """What is kept of one client's answer besides the sum: plain numbers."""

    client: str
    numbers: Mapping[str, float]

    @classmethod
    def of(cls, client: str, update: Update[Any], down: int, up: int) -> Report:
        """A trained client's line: its work, the bytes of the tensors in its task and its answer, its own metrics."""
        numbers = {
            **update.metrics,
            "examples": float(update.examples),
            "steps": float(update.steps),
            "lr_sum": float(update.lr_sum),
            "bytes_down": float(down),
            "bytes_up": float(up),
        }
        return cls(client, numbers)


@dataclass(frozen=True)
class Round:
    """What one round leaves behind. ``numbers`` is its line of metrics."""

    number: int
    numbers: Mapping[str, float]
    reports: Sequence[Report] = field(default_factory=tuple)
    failures: Sequence[Failure] = field(default_factory=tuple)


@dataclass(frozen=True)
class Part:
    """Answers from ``position`` of the cohort on: one client's, or those of a whole leaf with their sum.

    ``total`` is None where nobody succeeded.
    """

    position: int
    total: Contribution | None
    reports: Sequence[Report] = field(default_factory=tuple)
    failures: Sequence[Failure] = field(default_factory=tuple)


class Fleet(Protocol):
    """Implementations own their clients' state (``mine``), staged until :meth:`settle`."""

    @property
    def population(self) -> Sequence[str]:
        """All clients known, in a fixed order."""
        ...

    @property
    def reachable(self) -> Sequence[str]:
        """Those of the population that would hear a task now, in the same order."""
        ...

    def recall(self, round: int) -> tuple[Sequence[str], int] | None:
        """The cohort of a round that was begun before this process was, and the size of the population then."""
        ...

    def train(self, ask: Ask) -> Iterator[Part]:
        """Every client of the cohort is reported or failed exactly once, unless the goal was reached before."""
        ...

    def settle(self, counted: Collection[str]) -> None:
        """The receipt: the staged state of counted clients takes effect, that of others is dropped."""
        ...

    def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
        """Each client's own model on its own held-out examples."""
        ...

    def keep_in(self, folder: Path) -> None:
        """Where states of clients may be kept that checkpoints refer to; told before :meth:`restore`, if at all."""
        ...

    def snapshot(self) -> Mapping[str, int]:
        """Make the settled client states safe; what a checkpoint notes to find them again."""
        ...

    def restore(self, note: Mapping[str, int]) -> None:
        """Go back to the client states of which :meth:`snapshot` gave this note; nothing noted: to none."""
        ...

    def close(self) -> None:
        """Release processes, memory and connections; may be called twice."""
        ...
