"""``shoal.flower.run``: this process and the one that forks the workers import Flower at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.client.process import cores
from shoal.flower.app import FlowerApp, GivenApp, Scalar, changed
from shoal.protos.errors import ExperimentError
from shoal.simulations.nursery import begin

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from shoal.run import Run

__all__ = ["WORKER", "run"]

WORKER = "shoal.flower.worker"  # the program


def run(
    app: str | Path | tuple[ServerApp, ClientApp],
    overrides: Sequence[str] | Mapping[str, Scalar] = (),
    *,
    nodes: int | None = None,
    seed: int = 0,
    engine: str = "auto",
    workers: int | None = None,
    ray_address: str | None = None,
    out: str | Path = "runs",
    progress: str = "auto",
) -> Run:
    """Run the Flower app in this folder with ``nodes`` clients (None: as many as its pyproject says, or Flower's 2).

    ``app`` may also be a ServerApp and a ClientApp. ``overrides`` are ``"key=value"`` of the folder's run config; of
    two objects they are the run config. ``workers`` processes play the clients (None: one a core, 0: in this process,
    where a debugger sees them); with the engine ``"ray"``, actors of the cluster at ``ray_address`` (``"auto"``,
    host:port; None: one of its own), by default one for each of its CPUs. The seed decides which node is which client,
    and what the app draws from the global generators of Python, NumPy and PyTorch, whatever plays the clients.

    ExperimentError if it is no app or cannot be loaded; RunError if its server fails, or nobody answers it.
    """
    found = GivenApp(*app, changed(overrides)) if isinstance(app, tuple) else FlowerApp.read(app, overrides)
    if engine not in ("auto", "ray"):
        raise ExperimentError(f"there is no engine {engine!r} for a Flower app; leave it out, or give 'ray'")
    on_ray = engine == "ray" or ray_address is not None
    workers = cores() if workers is None and not on_ray else workers
    if workers and not on_ray:
        begin(WORKER)
    from shoal.flower.running import Play, played  # and with it flwr

    play = Play(found, found.nodes if nodes is None else nodes, seed, workers, on_ray, ray_address)
    return played(play, Path(out), progress)
