"""Making the runs of cells, in worker processes."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from pathlib import Path

from shoal.cell import Ended, Order
from shoal.grid import Cell
from shoal.protos.errors import ExperimentError
from shoal.simulations.crew import Crew, Died
from shoal.simulations.packing import pack
from shoal.simulations.shared import SharedBlock
from shoal.tally import Tally

__all__ = ["make"]


def make(cells: Sequence[Cell], store: Path, engine: str, workers: int, show: Tally) -> Generator[tuple[Cell, Ended]]:
    """How each cell ended, as it does. One whose worker was lost is run once more, on another worker.

    There are ``workers`` cores for them: with fewer cells, each has several processes, which does not change its bits.
    """
    if not cells:
        return
    at_once = min(workers, len(cells))
    each = workers // at_once
    packed, block = _pack(cells)
    orders = {
        cell: Order(number, cell.name, store / cell.key, engine, each if each > 1 else 0)
        for number, cell in enumerate(cells)
    }
    with closing(block), closing(Crew("shoal.cell", packed, at_once)) as crew:
        crew.ready()
        yield from _answers(crew, orders, at_once, show)


def _answers(crew: Crew, orders: dict[Cell, Order], at_once: int, show: Tally) -> Generator[tuple[Cell, Ended]]:
    waiting, running, again = deque(orders), dict[Future[Ended | Died], Cell](), set[Cell]()
    while waiting or running:
        while waiting and len(running) < at_once:
            cell = waiting.popleft()
            show.began(cell.name)
            running[crew.submit(orders[cell])] = cell
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell, answer = running.pop(future), future.result()
            if isinstance(answer, Ended):
                yield cell, answer
            elif cell in again:
                yield cell, Ended(0.0, f"its worker process was lost twice ({answer.reason})")
            else:
                show.note(f"{cell.name}: its worker process was lost ({answer.reason}); running it again")
                again.add(cell)
                waiting.appendleft(cell)


def _pack(cells: Sequence[Cell]) -> tuple[bytes, SharedBlock]:
    try:
        packed, block = pack([cell.experiment for cell in cells])
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ExperimentError(f"the experiment cannot be sent to a worker process: {error}") from error
    return pickle.dumps(packed), block
