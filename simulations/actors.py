"""The actors of a Ray cluster that play clients; one that is lost is replaced while there is room for it."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from shoal.client.process import KEEP_MEMORY, ONE_THREAD
from shoal.protos.errors import RunError
from shoal.simulations.crew import Died
from shoal.simulations.packing import by_value
from shoal.simulations.parcels import Parcel, unwrap, wrap
from shoal.simulations.player import Player, versions
from shoal.simulations.session import Session

__all__ = ["PATIENCE", "Actors"]

PATIENCE = 120.0  # seconds: for a CPU that another job of the cluster holds, or a node that is starting
GRACE = 0.5  # seconds after the deadline: for the answer of an actor that kept it


class Timed(Protocol):
    """A job that may have a deadline."""

    def left(self) -> float | None:
        """Seconds until then."""
        ...


J = TypeVar("J", bound=Timed)


@dataclass
class _Actor(Generic[J]):
    """``does`` is what it was last asked for: to be there, to load the assignment, to show itself, to do a job."""

    handle: Any
    does: Literal["start", "load", "show", "run"] = "start"
    job: J | None = None


class Actors(Generic[J]):
    """As many as are ``wanted``, or as the cluster has CPUs; Ray begins those for which there is room.

    Each is a ``player`` with this assignment. ``patience`` is how many seconds to wait while there is room for none.
    """

    def __init__(
        self, session: Session, player: type[Player], assignment: object, wanted: int | None, patience: float
    ) -> None:
        self._session, self._ray, self._wanted, self._patience = session, session.ray, wanted, patience
        with by_value():
            self._assignment = self._ray.put(wrap(assignment))
        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "runtime_env": {"env_vars": _environment()}}
        self._remote, self._versions = self._ray.remote(**options)(player), versions(player.packages)
        self._asked = dict[Any, _Actor[J]]()  # by the reference to the answer
        self._idle = list[_Actor[J]]()
        self._impatient_at: float | None = None
        self._stillborn = 0  # one after the other

    @property
    def idle(self) -> int:
        """How many are free."""
        return len(self._idle)

    @property
    def busy(self) -> list[J]:
        """The jobs being done."""
        return [actor.job for actor in self._asked.values() if actor.job is not None]

    def start(self) -> None:
        """Return when the first one is ready; RunError or ExperimentError if there can be none."""
        self.fill()
        while not self._idle:
            for _ in self.wait(None):
                pass

    def fill(self) -> None:
        """Start those that are missing; if the cluster has become smaller, no more than it has CPUs."""
        for _ in range(self._places() - len(self._asked) - len(self._idle)):
            handle = self._remote.remote()
            self._asked[handle.show.remote()] = _Actor(handle)

    def _places(self) -> int:
        return self._wanted or max(1, self._session.cpus())

    def call_the_roll(self) -> None:
        """Let idle ones show themselves before they are trusted with work."""
        for actor in self._idle:
            actor.does = "show"
            self._asked[actor.handle.show.remote()] = actor
        self._idle = []

    def begin(self, job: J, sent: Parcel, common: Any) -> None:
        """Give a job to one that is free: what is ``sent`` to it alone, and what it has in ``common`` with others."""
        actor = self._idle.pop()
        actor.does, actor.job = "run", job
        self._asked[actor.handle.run.remote(sent, common, job.left())] = actor

    def wait(self, seconds: float | None) -> Iterator[tuple[J, Any | Died]]:
        """Until an actor answers or is overdue, at most so many seconds; the job that is done or lost by it."""
        if not self._asked:
            return
        limits = [seconds, self._until_overdue(), self._until_impatient()]
        timeout = min((max(0.0, limit) for limit in limits if limit is not None), default=None)
        answered, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=timeout)
        for reference in answered:
            yield from self._take(reference, self._asked.pop(reference))
        for reference, actor in list(self._asked.items()):
            if actor.job is not None and (left := actor.job.left()) is not None and left + GRACE <= 0:
                del self._asked[reference]
                yield from self._lose(actor, "busy beyond the deadline")

    def _take(self, reference: Any, actor: _Actor[J]) -> Iterator[tuple[J, Any | Died]]:
        try:
            # Copied: the memory of the object store goes with the session, results stay.
            answer = unwrap(self._ray.get(reference), copy=True)
        except self._ray.exceptions.RayError as error:
            if actor.does in ("start", "load"):
                self._check_start(error)
            yield from self._lose(actor, _reason(error))
            return
        if isinstance(answer, Exception):
            raise answer
        if actor.does == "start":
            actor.does = "load"
            self._asked[actor.handle.load.remote(self._assignment, self._versions)] = actor
            return
        self._stillborn = 0
        self._idle.append(actor)
        job, actor.job = actor.job, None
        if job is not None:
            yield job, answer

    def _check_start(self, error: Exception) -> None:
        """RunError if there is no point in starting another one."""
        self._stillborn += 1
        if isinstance(error, self._ray.exceptions.RayTaskError) or self._stillborn > self._places():
            raise RunError(
                f"an actor cannot start on the Ray cluster ({_reason(error)}); its nodes need what this process has: "
                f"Shoal, and the modules that the experiment or the app imports"
            ) from error

    def _lose(self, actor: _Actor[J], reason: str) -> Iterator[tuple[J, Died]]:
        self._ray.kill(actor.handle)
        self.fill()
        if actor.job is not None:
            yield actor.job, Died(reason)

    def _until_overdue(self) -> float | None:
        left = [seconds for job in self.busy if (seconds := job.left()) is not None]
        return min(left) + GRACE if left else None

    def _until_impatient(self) -> float | None:
        """How many seconds there may go on to be no actor at all; RunError when they are over."""
        if self._idle or any(actor.does != "start" for actor in self._asked.values()):
            self._impatient_at = None
            return None
        now = time.monotonic()
        self._impatient_at = self._impatient_at or now + self._patience
        if now < self._impatient_at:
            return self._impatient_at - now
        raise RunError(
            f"the Ray cluster, which has {self._session.cpus()} CPUs, had none free for {self._patience:g} s; free one "
            f"or add a node with 'ray start --address=HOST:PORT', then go on with 'shoal resume'"
        )

    def drop(self, unwanted: Callable[[J], bool]) -> None:
        """Kill those that have such a job, which are then replaced."""
        for reference, actor in list(self._asked.items()):
            if actor.job is not None and unwanted(actor.job):
                del self._asked[reference]
                self._ray.kill(actor.handle)
                self.fill()

    def close(self) -> None:
        """Kill all; may be called twice."""
        for actor in [*self._idle, *self._asked.values()]:
            self._ray.kill(actor.handle)
        self._idle, self._asked, self._assignment = [], {}, None


def _environment() -> dict[str, str]:
    """An actor's: one core, and what this process can import beside what an interpreter has by itself."""
    own = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    paths = [str(Path(path).absolute()) for path in sys.path if Path(path).exists()]
    return ONE_THREAD | KEEP_MEMORY | {"PYTHONPATH": os.pathsep.join(p for p in paths if not p.startswith(own))}


def _reason(error: Exception) -> str:
    """Ray's many lines in some words."""
    if (cause := getattr(error, "cause", None)) is not None:
        return f"{type(cause).__name__}: {cause}"
    last = str(error).strip().rpartition("\n")[2]
    return last.rpartition(" because ")[2].partition(". ")[0].strip().rstrip(".")
