"""Flower, both ways: its apps run on Shoal's processes, Shoal's strategies run inside it, its strategies inside Shoal.

This package is the only place that touches flwr (docs/flower.md). Everything here is imported on first use.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from shoal.protos.errors import ExperimentError

if TYPE_CHECKING:
    from shoal.flower.app import FlowerApp as FlowerApp
    from shoal.flower.borrowed import simulate as simulate
    from shoal.flower.hosted import strategy as strategy
    from shoal.flower.member import client_app as client_app
    from shoal.flower.member import initial_arrays as initial_arrays
    from shoal.flower.serving import serve as serve
    from shoal.flower.starting import run as run

__all__ = ["FlowerApp", "check_version", "client_app", "initial_arrays", "run", "serve", "simulate", "strategy"]

LOWEST, BEYOND = (1, 36), (1, 43)  # what the tests have been run with, from the first on and before the second

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_HOMES = {
    "FlowerApp": "shoal.flower.app",
    "client_app": "shoal.flower.member",
    "initial_arrays": "shoal.flower.member",
    "run": "shoal.flower.starting",
    "serve": "shoal.flower.serving",
    "simulate": "shoal.flower.borrowed",
    "strategy": "shoal.flower.hosted",
}


def check_version(found: str | None = None) -> None:
    """ExperimentError unless flwr is there, in a version that this package knows; ``found`` is that version."""
    if found is None:
        try:
            found = version("flwr")
        except PackageNotFoundError:
            raise ExperimentError(f"flwr is not installed; {_wanted()}") from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not LOWEST <= (int(numbers[1]), int(numbers[2])) < BEYOND:
        raise ExperimentError(f"flwr {found} is not a version that this version of Shoal knows; {_wanted()}")


def _wanted() -> str:
    lowest, beyond = (".".join(map(str, numbers)) for numbers in (LOWEST, BEYOND))
    return f"pip install 'flwr>={lowest},<{beyond}'"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal.flower' has no attribute {name!r}")
    check_version()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
