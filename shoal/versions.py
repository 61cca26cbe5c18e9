"""Of what a result may depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Python's, Shoal's, and those of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in ("shoal", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
