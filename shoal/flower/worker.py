"""The program of a process that plays ClientApps; see :mod:`shoal.flower.workers`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from shoal.client.process import answers_on, collecting_less, jobs_on
from shoal.flower.arrays import quick_arrays
from shoal.flower.compat import identify, message_from
from shoal.flower.drawing import seed_all
from shoal.flower.flat import flat, full_turn
from shoal.flower.records import quick_records
from shoal.flower.turns import Answer, Turn, copied, failed, play
from shoal.flower.uncompiled import compiler_later
from shoal.flower.workers import Order
from shoal.protos.errors import ExperimentError, ShoalError
from shoal.simulations import answers as messages
from shoal.simulations.crew import read, write
from shoal.simulations.packing import unpack
from shoal.simulations.shared import SharedMemory

__all__ = ["answered", "loaded", "main"]

T = TypeVar("T")


def main() -> None:
    """Load the app, then answer orders until the other side is gone."""
    answers, orders = answers_on(), jobs_on()  # PyTorch, if the app has it, takes one thread from the environment
    compiler_later()
    with ExitStack() as modules:
        modules.enter_context(quick_arrays())
        modules.enter_context(quick_records())
        try:
            app = loaded(lambda: unpack(orders), modules)
        except EOFError:
            return
        modules.enter_context(collecting_less())
        write(answers, app if isinstance(app, ShoalError) else "ready")
        path, content = None, RecordDict()  # what was sent last, often to many nodes
        while isinstance(app, ClientApp):
            try:
                together: list[Order] = read(orders)
            except EOFError:
                return
            began, found = time.perf_counter(), list[messages.Answer | tuple[Any, ...]]()
            for turn, published, memory in together:
                if published.path != path:
                    path, content = published.path, published.open()
                found.append(answered(app, full_turn(turn), content, partial(_pack, memory)))
            write(answers, (time.perf_counter() - began, found))


def _pack(memory: SharedMemory | None, answer: Answer) -> messages.Answer | tuple[Any, ...]:
    odd = list[Any]()
    found = flat(answer, odd)
    return messages.pack(found, memory) if odd else found


def loaded(load: Callable[[], tuple[Any, int]], modules: ExitStack) -> ClientApp | ShoalError:
    """The ClientApp of the app and the run that are loaded, or why there can be none; EOFError if they never came.

    Its modules can be imported as long as ``modules`` is open.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        app, run_id = load()
        identify(run_id)
        modules.enter_context(app.importable())
        return app.client_app()  # type: ignore[no-any-return]
    except EOFError:
        raise
    except ShoalError as error:
        return error
    except BaseException as error:
        return ExperimentError(f"a worker process cannot load the ClientApp: {type(error).__name__}: {error}")


def answered(app: ClientApp, turn: Turn, content: RecordDict, pack: Callable[[Answer], T]) -> T:
    """The answer of one turn, packed; ``content`` stays as it is."""
    seed_all(turn.seed)
    answer = play(app, turn, copied(content))
    try:  # here, where it can be told what is wrong with it
        return pack(answer)
    except Exception as error:
        reason = f"the reply cannot be pickled ({type(error).__name__}: {error})"
        message = message_from(turn.metadata, content=RecordDict())
        return pack(failed(message, reason, reason))
