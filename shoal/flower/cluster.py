"""ClientApps on a Ray cluster, in actors of one CPU each; what many nodes are sent lies once in Ray's object store.

The actors are those of :mod:`shoal.simulations.actors`. One thread talks to them: it takes turns from a queue and gives
their answers to whoever waits. Ray cannot be woken, so it looks up from its answers every ``PULSE``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np
from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from shoal.client.process import cores
from shoal.flower.app import App, FlowerApp
from shoal.flower.arrays import Packed, pack, quick_arrays, unpack
from shoal.flower.records import quick_records
from shoal.flower.sent import Sent
from shoal.flower.stage import give, opened
from shoal.flower.turns import Answer, Turn
from shoal.flower.worker import answered, loaded
from shoal.protos.errors import ExperimentError, ShoalError
from shoal.simulations.actors import PATIENCE, Actors
from shoal.simulations.crew import Died
from shoal.simulations.parcels import Parcel, unwrap, wrap
from shoal.simulations.player import Player
from shoal.simulations.session import Session

__all__ = ["AppPlayer", "Cluster"]

PULSE = 0.02  # seconds


class AppPlayer(Player):
    """One ClientApp. A job is a turn; in common with others it has the packed content of its message."""

    packages: ClassVar[tuple[str, ...]] = (*Player.packages, "flwr")
    _app: ClientApp

    def prepare(self, assignment: Parcel) -> ShoalError | None:
        self._modules = ExitStack()  # open as long as the process lives
        self._modules.enter_context(quick_arrays())
        self._modules.enter_context(quick_records())
        app = loaded(lambda: unwrap(assignment), self._modules)
        if isinstance(app, ShoalError):
            return app
        self._app = app
        return None

    def run(self, job: Parcel, common: Parcel, seconds: float | None) -> Parcel:
        return _parcel(answered(self._app, unwrap(job), unpack(*unwrap(common)), pack))


def _parcel(packed: Packed) -> Parcel:
    """So that Ray, too, leaves the bytes of arrays where they are."""
    pickled, buffers = packed
    return wrap((pickled, [np.frombuffer(buffer, np.uint8) for buffer in buffers]))


def _load(packed: Packed) -> Answer:
    return unpack(*packed)  # type: ignore[no-any-return]


@dataclass(eq=False)
class _Job:
    """A turn, where its content lies, and its answer to come."""

    turn: Turn
    published: Any
    answer: Future[Answer] = field(default_factory=Future)

    def left(self) -> None:
        """How long a strategy waits is the grid's affair, which abandons what is late."""


class Cluster:
    """``workers`` actors, or one for each CPU of the cluster at ``address`` (None: of a Ray on this machine alone).

    ExperimentError without Ray or for an app that cannot be loaded, RunError if the cluster cannot be used. One that
    cannot be used any more fails the turns that are left.
    """

    def __init__(
        self, app: App, run_id: int, workers: int | None, address: str | None, *, patience: float = PATIENCE
    ) -> None:
        if workers is not None and workers < 1:
            raise ExperimentError(f"workers is {workers}; on a Ray cluster it must be 1 or more")
        sent = Sent.of(app) if isinstance(app, FlowerApp) else app
        self._session = Session(address, workers or cores())
        self._jobs, self._ending, self._ended = SimpleQueue[_Job | None](), threading.RLock(), False
        self._why: Died | None = None
        self._thread = threading.Thread(target=self._work, name="shoal-ray", daemon=True)
        self._actors = Actors[_Job](self._session, AppPlayer, (sent, run_id), workers, patience)
        try:
            self._actors.start()
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def publish(self, content: RecordDict) -> Any:
        return self._session.ray.put(_parcel(pack(content)))

    def submit(self, turn: Turn, published: Any) -> Future[Answer]:
        job = _Job(turn, published)
        with self._ending:
            ended = self._ended
            if not ended:
                self._jobs.put(job)
        if ended:
            self._give_up(job)
        return job.answer

    def together(self) -> AbstractContextManager[None]:
        """It makes no difference here."""
        return nullcontext()

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """The actors that are busy with them are ended at the next pulse, and replaced; others are left alone."""
        for future in futures:
            future.cancel()

    def close(self) -> None:
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._actors.close()
        self._session.close()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        waiting = deque[_Job]()
        try:
            while self._take(waiting):
                self._begin(waiting)
                for job, found in self._actors.wait(PULSE):
                    give(job.answer, opened(found, job.turn, _load))
                self._actors.drop(lambda job: job.answer.cancelled())
        except Exception as error:  # no CPU, no cluster
            self._why = Died(str(error))
        self._end(waiting)

    def _take(self, waiting: deque[_Job]) -> bool:
        """Let new jobs wait; with nothing to do, until there is one. False when it is over."""
        resting = not waiting and not self._actors.busy
        while resting or not self._jobs.empty():
            job = self._jobs.get()
            if job is None:
                return False
            if resting:
                self._actors.call_the_roll()
                self._actors.fill()
            waiting.append(job)
            resting = False
        return True

    def _begin(self, waiting: deque[_Job]) -> None:
        while waiting and self._actors.idle:
            job = waiting.popleft()
            if not job.answer.cancelled():
                self._actors.begin(job, wrap(job.turn), job.published)

    def _end(self, waiting: deque[_Job]) -> None:
        """Nothing is played any more: nobody may wait for an answer that does not come."""
        with self._ending:
            self._ended = True
            while not self._jobs.empty():
                if (job := self._jobs.get()) is not None:
                    waiting.append(job)
        for job in [*self._actors.busy, *waiting]:
            self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        if self._why is None:
            job.answer.cancel()  # the run is over
        else:
            give(job.answer, opened(self._why, job.turn, _load))
