"""What plays ClientApps; and the simplest such stage: this process, one message after the other, with breakpoints.

:mod:`shoal.flower.workers` has the stage of worker processes, :mod:`shoal.flower.cluster` that on a Ray cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from shoal.flower.compat import APP_RAISED, CRASHED, message_from
from shoal.flower.drawing import generators_kept, seed_all
from shoal.flower.turns import Answer, Turn, copied, failed, play
from shoal.simulations.crew import Died

__all__ = ["InProcess", "Stage", "give", "opened"]


class Stage(Protocol):
    """Takes turns, gives answers."""

    def publish(self, content: RecordDict) -> Any:
        """What :meth:`submit` takes for this content, made once for all who are sent the same."""
        ...

    def submit(self, turn: Turn, published: Any) -> Future[Answer]:
        """The answer to come; the future is cancelled if it was abandoned."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """What is submitted meanwhile is submitted at once."""
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
        self._together = False

    def publish(self, content: RecordDict) -> RecordDict:
        return content

    def submit(self, turn: Turn, published: RecordDict) -> Future[Answer]:
        future = Future[Answer]()
        own = replace(turn, context=replace(turn.context, state=copied(turn.context.state)))
        with self.together():
            seed_all(turn.seed)
            answer = play(self._app, own, copied(published))
        future.set_result(answer)
        return future

    @contextmanager
    def together(self) -> Iterator[None]:
        """The caller's generators come back once: it takes as long as a small turn."""
        with self._playing, ExitStack() as caller:
            if not self._together:
                caller.enter_context(generators_kept())
                self._together = True
                caller.callback(setattr, self, "_together", False)
            yield

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """There are none: a turn is over before :meth:`submit` returns."""

    def close(self) -> None:
        return


def give(future: Future[Answer], answer: Answer) -> None:
    """Unless nobody wants it any more."""
    if future.set_running_or_notify_cancel():
        future.set_result(answer)


def opened(found: Any, turn: Turn, load: Callable[[Any], Answer]) -> Answer:
    """The answer that ``load`` takes out of what a worker or an actor has given back, be it none."""
    code = APP_RAISED
    if isinstance(found, Died | Exception):
        code, reason = CRASHED, f"its process was lost ({found.reason if isinstance(found, Died) else found})"
    else:
        try:
            return load(found)
        except Exception as error:
            reason = f"its reply cannot be taken out of its process ({type(error).__name__}: {error})"
    return failed(message_from(turn.metadata, content=RecordDict()), reason, reason, code=code)
