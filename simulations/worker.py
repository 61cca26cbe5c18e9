"""The program of a worker process; see :mod:`shoal.simulations.pool`."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor

from shoal.protos.errors import ExperimentError, ShoalError
from shoal.simulations.engine import Engine
from shoal.simulations.packing import unpack
from shoal.simulations.pool import Order, read, write
from shoal.strategies.base import State
from shoal.strategies.sums import Carried

__all__ = ["main"]


def main() -> None:
    """Build the engine, then answer orders until the other side is gone."""
    # The pipe is for messages; what a user's code prints must not get between them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    engine = _engine(answers)
    while engine is not None:
        try:
            order: Order = read(sys.stdin.buffer)
        except EOFError:
            return
        write(answers, engine.run(order.job, *_state(order), order.seconds))


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, even if a client's code never returns to read the pipe."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
