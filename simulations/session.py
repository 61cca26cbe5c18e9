"""The connection to Ray: the caller's own, one to a running cluster, or to a Ray that is started on this machine."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal.protos.errors import ExperimentError, RunError

__all__ = ["Session"]

SECONDS = 5.0  # in which a cluster must answer
# Processes that Ray starts beforehand cannot become actors with an environment of their own.
NO_SPARE = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


class Session:
    """``ray`` is the module, connected.

    A connection that this process has is used and left alone. Otherwise ``address`` says what to connect to ("auto":
    the cluster of this machine), and None starts a Ray with ``cpus`` CPUs here. ExperimentError without Ray, RunError
    without a cluster.
    """

    def __init__(self, address: str | None, cpus: int) -> None:
        self.ray = _imported()
        self._ours = not self.ray.is_initialized()
        if not self._ours:
            _check_same(self.ray, address)
        elif address is None:
            _start(self.ray, cpus)
        else:
            _connect(self.ray, address)

    def cpus(self) -> int:
        """How many the cluster has now, busy or not."""
        return int(self.ray.cluster_resources().get("CPU", 0))

    def close(self) -> None:
        """End the connection and what was started, if they were made here; may be called twice."""
        if self._ours:
            self._ours = False
            with _quiet():
                self.ray.shutdown()
            self.ray._private.worker._worker_logs_enabled = True


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ExperimentError("the engine 'ray' needs Ray, which is not installed; pip install 'shoal[ray]'") from error
    return ray


def _check_same(ray: Any, address: str | None) -> None:
    here = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", here):
        raise RunError(
            f"this process is connected to the Ray cluster at {here}, not at {address}; give that address, or call "
            f"ray.shutdown() first"
        )


def _start(ray: Any, cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _loopback(ray):
        _init(ray, address="local", num_cpus=cpus, include_dashboard=False, _system_config=NO_SPARE)


def _connect(ray: Any, address: str) -> None:
    try:
        if address != "auto":
            _dial(address)
        _init(ray, address=address)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RunError(
            f"cannot use a Ray cluster at {address!r} ({first}); start one with 'ray start --head', or leave the "
            f"address out to use this machine alone"
        ) from error


def _dial(address: str) -> None:
    """Ray itself would try for minutes where there is nothing."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ValueError("an address is host:port, or auto")
    socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()


def _init(ray: Any, **how: Any) -> None:
    with _quiet():
        ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
    # Else Ray prints to standard output, among a run's own lines, when a process dies.
    ray._private.worker._worker_logs_enabled = False


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray leaves files for the garbage collector, and warns of its own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _loopback(ray: Any) -> Iterator[None]:
    """Let Ray listen on this machine alone, as it does by itself only where it knows no clusters (macOS, Windows)."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
