"""The ``shoal`` command in a process that dies where it is told to.

    python -m tests.chaos.launch POINT COUNT -- server EXPERIMENT.toml --listen …

runs ``shoal server …`` until POINT is passed for the COUNT-th time, and kills itself with SIGKILL. POINT ``-`` is none;
the driver arms its processes while they run (:class:`tests.chaos.points.Arm`). A client's point may be one of the
process that trains: then it dies alone, unless COUNT is followed by a ``+``: then the process of the clients dies too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shoal.client.process import end_with
from tests.chaos import order, writes
from tests.chaos.points import POINTS, Arm, Side, Watch, Wiring, install, named

__all__ = ["main", "work"]


def main() -> None:
    """``POINT COUNT -- WORDS``, the words as behind ``shoal``."""
    point, count, _, *words = sys.argv[1:]
    wiring = Wiring.read()
    if point != "-":
        wiring = replace(wiring, first=Arm(named(point).name, int(count.removesuffix("+")), count.endswith("+")))
    os.environ |= wiring.environment()
    _prepare(wiring)
    watch, client = Watch(wiring), words[0] == "client"
    install((p for p in POINTS if p.side is (Side.HOST if client else Side.SERVER)), watch.passed)
    if wiring.full is not None:
        writes.install(Path(wiring.full))
    if wiring.order:
        order.install(watch.note)
    if client:
        _launch_workers()
    watch.note("started", {})
    sys.argv = ["shoal", *words]
    from shoal.cli import main as shoal

    shoal()


def work() -> None:
    """A client's worker, started by :func:`_launch_workers`."""
    wiring = Wiring.read()
    install((p for p in POINTS if p.side is Side.WORKER), Watch(wiring).passed)
    from shoal.client.worker import main as answer

    answer()


def _prepare(wiring: Wiring) -> None:
    if wiring.driver is not None:
        end_with(wiring.driver)  # however the driver ends, nothing of it stays
    if wiring.chunk is not None:
        from shoal.protos import transport

        transport.CHUNK = wiring.chunk


def _launch_workers() -> None:
    """Workers are started by way of this module, too."""
    from shoal.client import workers

    command: Callable[[str], list[str]] = vars(workers)["command"]
    usual = "from shoal.client.worker import main; main()"

    def ours(module: str) -> list[str]:
        *words, program = command(module)
        assert program.endswith(usual), program
        return [*words, program.removesuffix(usual) + "from tests.chaos.launch import work; work()"]

    vars(workers)["command"] = ours


if __name__ == "__main__":
    main()
