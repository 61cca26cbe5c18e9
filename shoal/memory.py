"""How much memory a run took, as Linux counts it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["memory_mb"]

PROCESSES = Path("/proc")


def memory_mb() -> float | None:
    """The most that this process and its children have held so far, in MB; None where the system does not tell.

    Their peaks are added; what they share (libraries, the data set, a round's state) counts once. Takes milliseconds.
    """
    own, shared = 0, 0
    for found in PROCESSES.glob("[0-9]*/status"):
        try:
            status = dict(line.split(":", 1) for line in found.read_text(errors="replace").splitlines())
        except OSError:
            continue  # it has just ended
        if "VmHWM" not in status or os.getpid() not in (int(status["Pid"]), int(status["PPid"])):
            continue
        peak, *common = (int(status[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem"))
        own, shared = own + peak - sum(common), max(shared, sum(common))
    return round((own + shared) * 1024 / 1e6, 1) if own else None
