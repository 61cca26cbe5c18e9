"""The program of a process that plays clients; see :mod:`shoal.simulations.pool`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shoal.protos.errors import ExperimentError, ShoalError
from shoal.simulations.answers import pack
from shoal.simulations.crew import open_pipes, read, write
from shoal.simulations.engine import Assignment, Engine
from shoal.simulations.packing import unpack
from shoal.simulations.pool import Order
from shoal.strategies.base import State
from shoal.strategies.sums import Carried

__all__ = ["build", "main"]


def main() -> None:
    """Build the engine, then answer orders until the other side is gone."""
    orders, answers = open_pipes()
    try:
        engine = build(lambda: unpack(orders))
    except EOFError:
        return
    write(answers, engine if isinstance(engine, ShoalError) else "ready")
    while isinstance(engine, Engine):
        try:
            order: Order = read(orders)
        except EOFError:
            return
        write(answers, pack(engine.run(order.job, *_state(order), order.seconds), order.answer))


def build(load: Callable[[], Assignment]) -> Engine | ShoalError:
    """The engine for what is loaded, or why there can be none; EOFError if that never came."""
    try:
        return Engine(load())
    except EOFError:
        raise
    except ShoalError as error:
        return error
    except Exception as error:
        return ExperimentError(f"a worker process cannot load the experiment: {type(error).__name__}: {error}")


def _state(order: Order) -> tuple[State, Carried]:
    tensors: dict[str, Tensor] = dict(order.block.tensors)
    carried = Carried(tensors.pop("/buffers"), tensors.pop("/counters"))
    return {**tensors, **order.numbers}, carried
