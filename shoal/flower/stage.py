"""Where ClientApps play: in this process, one message after the other, or in worker processes.

In this process breakpoints work. In workers an app that ends or hangs takes nobody along: its process is replaced.
:mod:`shoal.flower.cluster` has the stage on a Ray cluster.
"""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from shoal.flower.app import App
from shoal.flower.arrays import pack as pack_arrays
from shoal.flower.arrays import unpack
from shoal.flower.compat import APP_RAISED, CRASHED, message_from
from shoal.flower.turns import Answer, Turn, copied, drawing_from, failed, play
from shoal.simulations.crew import Crew, Died
from shoal.simulations.packing import pack
from shoal.simulations.shared import SharedBlock

__all__ = ["InProcess", "Order", "Stage", "Workers", "opened"]


class Stage(Protocol):
    """Takes turns, gives answers."""

    def publish(self, content: RecordDict) -> Any:
        """What :meth:`submit` takes for this content, made once for all who are sent the same."""
        ...

    def submit(self, turn: Turn, published: Any) -> Future[Answer]:
        """The answer to come; the future is cancelled if it was abandoned."""
        ...

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """Nobody wants these answers any more."""
        ...

    def close(self) -> None:
        """Release processes and memory; may be called twice."""
        ...


class InProcess:
    """Plays each turn when it is submitted; the caller's random generators come back as they were."""

    def __init__(self, app: ClientApp) -> None:
        self._app, self._playing = app, threading.RLock()  # a legacy server asks from many threads

    def publish(self, content: RecordDict) -> RecordDict:
        return content

    def submit(self, turn: Turn, published: RecordDict) -> Future[Answer]:
        future = Future[Answer]()
        own = replace(turn, context=replace(turn.context, state=copied(turn.context.state)))
        with self._playing, drawing_from(turn.seed):
            answer = play(self._app, own, copied(published))
        future.set_result(answer)
        return future

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """There are none: a turn is over before :meth:`submit` returns."""

    def close(self) -> None:
        return


class SharedContent:
    """A message's content in shared memory: what many are sent is written once."""

    def __init__(self, content: RecordDict) -> None:
        pickled, buffers = pack_arrays(content)
        parts = {str(i): _tensor(part) for i, part in enumerate([pickled, *buffers])}
        self._block = SharedBlock.of(parts)
        self.path = str(self._block.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_block": pickle.dumps(self._block)}  # attached to only if it is opened

    def open(self) -> RecordDict:
        """In another process: the content, in memory of its own."""
        block: SharedBlock = pickle.loads(cast(bytes, self._block))
        pickled, *buffers = (part.numpy().data for part in block.tensors.values())
        return cast(RecordDict, unpack(pickled, buffers))


def _tensor(part: bytes) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not to be written to
        return torch.from_numpy(np.frombuffer(part, np.uint8))


@dataclass(frozen=True)
class Order:
    """A turn, and where its content lies."""

    turn: Turn
    content: SharedContent


class Workers:
    """``workers`` processes, each with this app."""

    def __init__(self, app: App, run_id: int, workers: int) -> None:
        packed, self._data = pack((app, run_id))
        self._calls, self._changing = dict[Future[Answer], Future[Any]](), threading.RLock()
        self._bystanders = set[Future[Answer]]()
        try:
            self._crew = Crew("shoal.flower.worker", packed, workers)
        except BaseException:
            self._data.close()
            raise

    def publish(self, content: RecordDict) -> SharedContent:
        return SharedContent(content)

    def submit(self, turn: Turn, published: SharedContent) -> Future[Answer]:
        future = Future[Answer]()
        self._begin(Order(turn, published), future)
        return future

    def _begin(self, order: Order, future: Future[Answer]) -> None:
        def done(call: Future[Any]) -> None:
            if call.cancelled():
                return  # abandoned, or the crew is closing
            found = call.exception() or call.result()
            answer = opened(found, order.turn)
            with self._changing:  # or the future might be abandoned in between
                again = future in self._bystanders and isinstance(found, Died)
                self._bystanders.discard(future)
                if not again and not future.cancelled():
                    future.set_result(answer)
            if again:
                self._begin(order, future)

        with self._changing:
            call = self._calls[future] = self._crew.submit(order)
        call.add_done_callback(done)

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """End the processes that are busy with them; what else these were doing begins again."""
        with self._changing:
            self._calls = {future: call for future, call in self._calls.items() if not future.done()}
            for future in futures:
                future.cancel()
                if future in self._calls:
                    self._calls[future].cancel()
            left = [call for future, call in self._calls.items() if future.cancelled() and not call.done()]
            if left:
                self._bystanders.update(f for f, call in self._calls.items() if not f.done() and call.running())
                self._crew.kill_busy()

    def close(self) -> None:
        self._crew.close()
        self._data.close()


def opened(found: Any, turn: Turn) -> Answer:
    """The answer in what a worker or an actor has given back, be it none."""
    code = APP_RAISED
    if isinstance(found, Died | Exception):
        code, reason = CRASHED, f"its process was lost ({found.reason if isinstance(found, Died) else found})"
    else:
        try:
            return cast(Answer, unpack(*found))  # of a process of our own
        except Exception as error:
            reason = f"its reply cannot be taken out of its process ({type(error).__name__}: {error})"
    return failed(message_from(turn.metadata, content=RecordDict()), reason, reason, code=code)
