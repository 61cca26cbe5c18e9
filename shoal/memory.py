"""How much memory a run took, as Linux counts it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["memory_mb"]

PROCESSES = Path("/proc")


def memory_mb() -> float | None:
    """The most that this process and its descendants have held so far, in MB; None where the system does not tell.

    Their peaks are added; what they share (libraries, the data set, a round's state) counts once. Takes milliseconds.
    """
    own, shared = 0, 0
    for found in _family():
        status = _fields(found / "status")
        if "VmHWM" not in status:
            continue  # it has just ended
        peak, *common = (_kb(status, name) for name in ("VmHWM", "RssFile", "RssShmem"))
        pages = _fields(found / "smaps_rollup")  # what a process has of its parent by a fork is in these, not in those
        own += peak - sum(common) - (_kb(pages, "Anonymous") - _kb(pages, "Pss_Anon"))
        shared = max(shared, sum(common))
    return round((own + shared) * 1024 / 1e6, 1) if own else None


def _family() -> list[Path]:
    """This process, its children, theirs, and so on."""
    parents = {int(found.name): int(_fields(found / "status").get("PPid", 0)) for found in PROCESSES.glob("[0-9]*")}
    family = [os.getpid()]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return [PROCESSES / str(member) for member in family]


def _fields(file: Path) -> dict[str, str]:
    try:
        return dict(line.split(":", 1) for line in file.read_text(errors="replace").splitlines() if ":" in line)
    except OSError:
        return {}


def _kb(fields: Mapping[str, str], name: str) -> int:
    return int(fields.get(name, "0").split()[0])
