"""The program of a process that plays ClientApps; see :mod:`shoal.flower.stage`."""

from __future__ import annotations

import logging
import pickle
from contextlib import ExitStack
from typing import IO

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from shoal.client.process import jobs_on
from shoal.flower.compat import identify, message_from
from shoal.flower.stage import Order
from shoal.flower.turns import Answer, failed, play, seed_all
from shoal.protos.errors import ExperimentError, ShoalError
from shoal.simulations.crew import open_answers, read, write
from shoal.simulations.packing import unpack

__all__ = ["main"]


def main() -> None:
    """Load the app, then answer orders until the other side is gone."""
    answers, orders = open_answers(), jobs_on()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with ExitStack() as modules:
        try:
            app = _loaded(orders, modules)
        except EOFError:
            return
        write(answers, app if isinstance(app, ShoalError) else "ready")
        while isinstance(app, ClientApp):
            try:
                order: Order = read(orders)
            except EOFError:
                return
            write(answers, _pickled(order, _played(app, order)))


def _loaded(orders: IO[bytes], modules: ExitStack) -> ClientApp | ShoalError:
    try:
        app, run_id = unpack(orders)
        identify(run_id)
        modules.enter_context(app.importable())
        return app.client_app()  # type: ignore[no-any-return]
    except (EOFError, ShoalError) as error:
        if isinstance(error, EOFError):
            raise
        return error
    except BaseException as error:
        return ExperimentError(f"a worker process cannot load the ClientApp: {type(error).__name__}: {error}")


def _played(app: ClientApp, order: Order) -> Answer:
    seed_all(order.turn.seed)
    content: RecordDict = pickle.loads(order.content.tensors["pickled"].numpy().data)  # of the process that has workers
    return play(app, order.turn, content)


def _pickled(order: Order, answer: Answer) -> bytes:
    """Pickled here, where it can be told what is wrong with it."""
    try:
        return pickle.dumps(answer, protocol=5)
    except Exception as error:
        reason = f"the reply cannot be pickled ({type(error).__name__}: {error})"
        message = message_from(order.turn.metadata, content=RecordDict())
        return pickle.dumps(failed(message, reason, reason), protocol=5)
