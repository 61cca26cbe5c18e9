"""What an actor of a Ray cluster does; see :mod:`shoal.simulations.actors`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import torch

from shoal.protos.errors import RunError, ShoalError
from shoal.simulations.engine import Engine
from shoal.simulations.parcels import Parcel, unwrap, wrap
from shoal.simulations.worker import build

__all__ = ["EnginePlayer", "Player", "versions"]


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {package: version(package) for package in packages}


class Player(ABC):
    """Plays clients in a process of its own, which has one thread. Answers are parcels."""

    packages: ClassVar[tuple[str, ...]] = ("shoal", "torch", "numpy")  # what the bits depend on

    def show(self) -> Parcel:
        """Answer, as a sign of life."""
        return wrap(None)

    def load(self, assignment: Parcel, expected: Mapping[str, str]) -> Parcel:
        """Get ready; the answer is None, or why that cannot be. ``expected`` are the driver's versions."""
        torch.set_num_threads(1)
        found = versions(self.packages)
        return wrap(RunError(_differ(found, expected)) if found != expected else self.prepare(assignment))

    @abstractmethod
    def prepare(self, assignment: Parcel) -> ShoalError | None:
        """Take what all jobs have in common; or say why not."""

    @abstractmethod
    def run(self, job: Parcel, common: Any, seconds: float | None) -> Parcel:
        """The result of a job; ``common`` is what others have too, ``seconds`` how long it may take."""


class EnginePlayer(Player):
    """One engine; ``common`` is the round's state and what is carried. See :mod:`shoal.simulations.cluster`."""

    _engine: Engine

    def prepare(self, assignment: Parcel) -> ShoalError | None:
        engine = build(lambda: unwrap(assignment))
        if isinstance(engine, ShoalError):
            return engine
        self._engine = engine
        return None

    def run(self, job: Parcel, common: Parcel, seconds: float | None) -> Parcel:
        state, carried = unwrap(common)
        return wrap(self._engine.run(unwrap(job, copy=True), state, carried, seconds))


def _differ(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    package = next(name for name in expected if found[name] != expected[name])
    return (
        f"a node of the Ray cluster has {package} {found[package]}, this process has {expected[package]}; install the "
        f"same version on all nodes"
    )
