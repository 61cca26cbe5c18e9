"""A disk that is full, as the server sees it: everything by which it writes raises."""

from __future__ import annotations

import errno
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["install"]

WRITES = (
    "shoal.server.spool:Incoming._write",
    "shoal.server.journal:Journal.take",
    "shoal.server.journal:Journal.open",
    "shoal.server.checkpoints:write_synced",
    "shoal.server.runs:write_whole",
    "shoal.server.runs:_write_line",
)


def install(sign: Path) -> None:
    """In the server: as long as the file ``sign`` exists, nothing can be written."""
    for where in WRITES:
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        setattr(owner, name, _failing(getattr(owner, name), sign))


def _failing(write: Callable[..., Any], sign: Path) -> Callable[..., Any]:
    @functools.wraps(write)
    def call(*arguments: Any, **named: Any) -> Any:
        if sign.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **named)

    return call
