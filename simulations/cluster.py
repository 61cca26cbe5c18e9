"""Engines on a Ray cluster: a round's jobs spread over actors of one CPU each, its state in Ray's object store.

An actor sums its job before anything crosses the network. One that dies, alone or with its node, takes down neither the
run nor its neighbours' clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from shoal.client.process import cores
from shoal.protos.errors import ExperimentError
from shoal.simulations.actors import PATIENCE, Actors
from shoal.simulations.crew import Died
from shoal.simulations.engine import Assignment, Job, Result
from shoal.simulations.parcels import wrap
from shoal.simulations.player import EnginePlayer
from shoal.simulations.session import Session
from shoal.strategies.base import State
from shoal.strategies.sums import Carried

__all__ = ["Cluster"]


class Cluster:
    """Engines in actors: ``workers`` of them, or one for each CPU of the cluster.

    ``address`` is "auto" or host:port; None starts a Ray on this machine alone. ExperimentError without Ray or for what
    cannot run on it; RunError if the cluster cannot be used, or had no CPU for ``patience`` seconds.
    """

    def __init__(
        self,
        assignment: Assignment,
        workers: int | None = None,
        address: str | None = None,
        *,
        patience: float = PATIENCE,
    ) -> None:
        if workers is not None and workers < 1:
            raise ExperimentError(f"workers is {workers}; on a Ray cluster it must be 1 or more")
        if assignment.device != "cpu":
            raise ExperimentError(
                f"device is {assignment.device!r}, but the engine 'ray' has CPUs only; set device = 'cpu'"
            )
        self._wanted = workers
        self._session = Session(address, workers or cores())
        self._actors = Actors[Job](self._session, EnginePlayer, assignment, workers, patience)
        try:
            self._actors.start()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """How many jobs run at the same time: what is wanted, but no more than there are CPUs now."""
        cpus = max(1, self._session.cpus())
        return min(self._wanted or cpus, cpus)

    def run(self, jobs: Sequence[Job], state: State, carried: Carried) -> Iterator[tuple[Job, Result | Died]]:
        """Each job's result as it comes. An actor busy well beyond the deadline is killed and replaced."""
        common, waiting = self._session.ray.put(wrap((state, carried))), deque(jobs)
        self._actors.call_the_roll()
        self._actors.fill()
        try:
            while waiting or self._actors.busy:
                while waiting and (_late(waiting[0]) or self._actors.idle):
                    job = waiting.popleft()
                    if _late(job):
                        yield job, Died("not begun before the deadline")
                    else:
                        self._actors.begin(job, wrap(job), common)
                if waiting or self._actors.busy:
                    yield from self._actors.wait(waiting[0].left() if waiting else None)
        except BaseException:
            self._actors.drop(lambda job: True)  # the caller has lost interest: nothing may linger on an old round
            raise

    def close(self) -> None:
        """End the actors, and Ray if it was started here; may be called twice."""
        self._actors.close()
        self._session.close()


def _late(job: Job) -> bool:
    return (left := job.left()) is not None and left <= 0
