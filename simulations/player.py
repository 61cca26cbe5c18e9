"""What an actor of a Ray cluster does: it plays clients on one engine; see :mod:`shoal.simulations.cluster`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import torch

from shoal.protos.errors import RunError, ShoalError
from shoal.simulations.parcels import Parcel, unwrap, wrap
from shoal.simulations.worker import build

__all__ = ["Player", "versions"]


def versions() -> dict[str, str]:
    """Of what the bits depend on."""
    return {package: version(package) for package in ("shoal", "torch", "numpy")}


class Player:
    """One engine in a process of its own, which has one thread. Answers are parcels."""

    def show(self) -> Parcel:
        """Answer, as a sign of life."""
        return wrap(None)

    def load(self, assignment: Parcel, expected: Mapping[str, str]) -> Parcel:
        """Build the engine; the answer is None, or why there can be none. ``expected`` are the driver's versions."""
        torch.set_num_threads(1)
        found = versions()
        if found != expected:
            return wrap(RunError(_differ(found, expected)))
        engine = build(lambda: unwrap(assignment))
        if isinstance(engine, ShoalError):
            return wrap(engine)
        self._engine = engine
        return wrap(None)

    def run(self, job: Parcel, common: Parcel, seconds: float | None) -> Parcel:
        """The result of a job; ``common`` is the round's state and what is carried."""
        state, carried = unwrap(common)
        return wrap(self._engine.run(unwrap(job, copy=True), state, carried, seconds))


def _differ(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    package = next(name for name in expected if found[name] != expected[name])
    return (
        f"a node of the Ray cluster has {package} {found[package]}, this process has {expected[package]}; install the "
        f"same version on all nodes"
    )
