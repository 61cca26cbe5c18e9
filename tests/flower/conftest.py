"""Flower apps of different kinds, each in a folder of its own, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import Run
from shoal.flower import run

APPS = Path(__file__).parent / "apps"
Play = Callable[..., tuple[Run, list[np.ndarray]]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Run an app with four nodes, in this process unless said otherwise: the run, and what the app has worked out."""

    def _play(name: str, config: dict[str, Any] | None = None, **how: Any) -> tuple[Run, list[np.ndarray]]:
        result = tmp_path / "result.npz"
        result.unlink(missing_ok=True)
        options: dict[str, Any] = {"nodes": 4, "workers": 0, "out": tmp_path / "runs", "progress": "none"} | how
        done = run(APPS / name, {"result": str(result), **(config or {})}, **options)
        if not result.exists():
            return done, []
        with np.load(result) as arrays:
            return done, [arrays[name] for name in arrays.files]

    return _play
