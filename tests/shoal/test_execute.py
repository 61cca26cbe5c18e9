"""How a run is stopped by signals."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.execute import PARTING, _interruptible


def a_coordinator() -> Any:
    coordinator = SimpleNamespace(stopping=False, committing=False)
    coordinator.stop = lambda: setattr(coordinator, "stopping", True)
    return coordinator


def test_a_round_that_does_not_end_within_its_grace_is_abandoned_once() -> None:
    """What it leaves to be kept is not cut off by the next alarm."""
    show: Any = SimpleNamespace(note=lambda text: None)
    with pytest.raises(KeyboardInterrupt), _interruptible(a_coordinator(), show, 0.01, lambda: None):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            left, _ = signal.getitimer(signal.ITIMER_REAL)

    assert PARTING - 1 < left <= PARTING
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
