"""The program of a process that runs cells of a comparison; see :mod:`shoal.comparing`."""

from __future__ import annotations

import io
import sys
import textwrap
import time
import traceback
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from shoal.protos.errors import ShoalError
from shoal.simulate import complete
from shoal.simulations.crew import open_pipes, read, write
from shoal.simulations.packing import unpack

__all__ = ["Ended", "Order", "main"]


@dataclass(frozen=True)
class Order:
    """Which of the experiments is to be run, into what folder, by which engine in how many processes (0: in this one).

    ``name`` is put before what the cell has to say.
    """

    number: int
    name: str
    path: Path
    engine: str
    workers: int


@dataclass(frozen=True)
class Ended:
    """How a cell ended: ``reason`` says why it failed; ``traceback`` where, if it was no error of Shoal's own."""

    seconds: float
    reason: str = ""
    traceback: str = ""


def main() -> None:
    """Run one experiment an order, until the other side is gone."""
    orders, answers = open_pipes()
    assignment: bytes = read(orders)
    write(answers, "ready")
    while True:
        try:
            order: Order = read(orders)
        except EOFError:
            return
        write(answers, _run(assignment, order))


def _run(assignment: bytes, order: Order) -> Ended:
    began, reason, trace = time.perf_counter(), "", ""
    try:
        with redirect_stderr(_Named(sys.stderr, order.name)):
            # Unpacked for every order: what a user's objects remember must not reach the next cell.
            made = unpack(io.BytesIO(assignment))[order.number]
            run = complete(made, order.path, engine=order.engine, workers=order.workers)
        reason = "" if run.status == "finished" else f"its worker process was asked to stop, the run is {run.status}"
    except ShoalError as error:
        reason = str(error)
    except Exception as error:
        reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    return Ended(time.perf_counter() - began, reason, trace)


class _Named(io.TextIOBase):
    """Standard error with the cell's name before each line: several cells speak at once."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):  # whoever reads may stop reading: the cell goes on
            self._file.write(textwrap.indent(text, f"{self._name} | "))
            self._file.flush()
        return len(text)
