"""The program of a process that plays clients; see :mod:`shoal.simulations.pool`."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from shoal.protos.errors import ExperimentError, ShoalError
from shoal.simulations.crew import open_answers, read, write
from shoal.simulations.engine import Engine
from shoal.simulations.packing import unpack
from shoal.simulations.pool import Order
from shoal.strategies.base import State
from shoal.strategies.sums import Carried

__all__ = ["main"]


def main() -> None:
    """Build the engine, then answer orders until the other side is gone."""
    answers = open_answers()
    engine = _engine(answers)
    while engine is not None:
        try:
            order: Order = read(sys.stdin.buffer)
        except EOFError:
            return
        write(answers, engine.run(order.job, *_state(order), order.seconds))


def _engine(answers: Any) -> Engine | None:
    try:
        engine = Engine(unpack(sys.stdin.buffer))
    except ShoalError as error:
        write(answers, error)
        return None
    except EOFError:
        return None
    except Exception as error:
        write(answers, ExperimentError(f"a worker process cannot load the experiment: {type(error).__name__}: {error}"))
        return None
    write(answers, "ready")
    return engine


def _state(order: Order) -> tuple[State, Carried]:
    tensors: dict[str, Tensor] = dict(order.block.tensors)
    carried = Carried(tensors.pop("/buffers"), tensors.pop("/counters"))
    return {**tensors, **order.numbers}, carried
