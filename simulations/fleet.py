"""The simulated fleet: virtual clients played by engines, in this process or in workers.

Simulated clients answer in cohort order and take no time, so which updates count depends on the cohort alone: the first
``goal`` that succeed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from shoal.protos.messages import Failure
from shoal.server.fleet import Ask, Part, Report
from shoal.simulations.blocks import Method
from shoal.simulations.crew import Died
from shoal.simulations.engine import LATE, Assignment, Engine, Job, Result
from shoal.simulations.pool import Pool
from shoal.simulations.states import MEMORY, ClientStates
from shoal.strategies.base import Mine, State, vector
from shoal.strategies.sums import LEAF, Carried

__all__ = ["LEAN", "Engines", "InProcess", "SimulatedFleet", "one_thread", "portions"]

LEAN = Method()
KEPT = "states of round"  # what a checkpoint notes of the clients' states
AT_ONCE = 4096  # clients that are evaluated before the next are looked at


class Engines(Protocol):
    """Where jobs run: in this process, in worker processes or on a cluster."""

    @property
    def workers(self) -> int:
        """How many jobs run at the same time."""
        ...

    def run(self, jobs: Sequence[Job], state: State, carried: Carried) -> Iterator[tuple[Job, Result | Died]]:
        """Each job once, as it is done, with its result or how its process was lost."""
        ...

    def close(self) -> None:
        """Release processes and memory."""
        ...


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a worker: PyTorch on one thread; and the caller's random generator comes back as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


class InProcess:
    """One engine in the calling process, single-threaded as a worker is, so that it gives the same bits."""

    workers = 1

    def __init__(self, assignment: Assignment) -> None:
        self._engine = Engine(assignment)

    def run(self, jobs: Sequence[Job], state: State, carried: Carried) -> Iterator[tuple[Job, Result | Died]]:
        for job in jobs:
            with one_thread():
                result = self._engine.run(job, state, carried, job.left())
            yield job, result

    def close(self) -> None:
        return


class SimulatedFleet:
    """A :class:`~shoal.server.fleet.Fleet` of the data set's clients; ``workers=0`` plays them in this process.

    ``engines`` makes another place for them, such as a :class:`~shoal.simulations.cluster.Cluster`. Of the clients'
    states at most ``memory`` bytes are held in memory between rounds.
    """

    def __init__(
        self,
        assignment: Assignment,
        workers: int = 0,
        method: Method = LEAN,
        *,
        engines: Callable[[Assignment], Engines] | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.assignment, self.method = assignment, method
        self.population = assignment.data.clients
        self.crew: Engines = (
            engines(assignment) if engines else Pool(assignment, workers) if workers else InProcess(assignment)
        )
        self.states = ClientStates(memory=memory)
        self._staged: dict[str, Mine] = {}
        self._round = 0

    @property
    def reachable(self) -> Sequence[str]:
        return self.population

    def recall(self, round: int) -> None:
        """Nothing of a round outlives the process that simulates it."""

    def train(self, ask: Ask) -> Iterator[Part]:
        self._staged, self._round = {}, ask.context.round
        ends = None if ask.deadline is None else time.monotonic() + ask.deadline
        missing = 0
        for part in self._run(ask, self._portions(min(ask.goal, len(ask.cohort)), ask.deadline), ends):
            missing += len(part.failures)
            yield part
        # Those asked beyond the goal stand in for clients that failed, in cohort order.
        spare = iter(range(ask.goal, len(ask.cohort)))
        while missing and (next_up := [p for _, p in zip(range(missing), spare, strict=False)]):
            missing = 0
            for part in self._run(ask, [range(position, position + 1) for position in next_up], ends):
                missing += len(part.failures)
                yield part

    def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
        for start in range(0, len(ask.cohort), step := self._at_once(ask)):
            some = replace(ask, cohort=ask.cohort[start : start + step])
            parts = self._run(some, self._portions(len(some.cohort)), None, train=False)
            for part in sorted(parts, key=lambda part: part.position):
                yield from part.failures
                yield from part.reports

    def _at_once(self, ask: Ask) -> int:
        """How many clients to evaluate together: a population may be large, and their states must be in memory."""
        state = max(1, vector(ask.state, "parameters").nbytes)  # is about as large as the model
        return max(2 * LEAF * self.crew.workers, min(AT_ONCE, self.states.memory // state))

    def _portions(self, count: int, deadline: float | None = None) -> list[range]:
        return portions(count, self.method, self.crew.workers, alone=deadline is not None)

    def _run(
        self, ask: Ask, portions: Sequence[range], ends: float | None, train: bool = True, lost: int = 0
    ) -> Iterator[Part]:
        """``lost`` counts how often workers died with these clients: once is no proof against them."""
        again = list[range]()
        jobs = [self._job(ask, portion, ends, train) for portion in portions]
        for job, result in self.crew.run(jobs, ask.state, ask.carried):
            if isinstance(result, Result):
                self._staged.update(result.staged)
                yield from result.parts
            elif (len(job.clients) > 1 or not lost) and (ends is None or time.monotonic() < ends):
                again.append(range(job.position, job.position + len(job.clients)))
            else:
                yield _lost(job, result, ends)
        if again and not lost:
            yield from self._run(ask, again, ends, train, lost=1)  # as it was, which gives the same bits
        elif again:
            yield from self._without_culprits(ask, again, ends, train)

    def _without_culprits(self, ask: Ask, portions: Sequence[range], ends: float | None, train: bool) -> Iterator[Part]:
        """One by one, so that only those fail who bring a worker down."""
        singles = [range(position, position + 1) for portion in portions for position in portion]
        if self.method.engine == "lean" or not train:
            yield from self._run(ask, singles, ends, train, lost=1)
            return
        # In blocks a client alone has other bits: found out who it is, the others are trained together again.
        jobs = [self._job(ask, single, ends, train) for single in singles]
        found = self.crew.run(jobs, ask.state, ask.carried)
        culprits = {job.clients[0][0]: result for job, result in found if isinstance(result, Died)}
        jobs = [replace(self._job(ask, portion, ends, train), lost=_why(culprits)) for portion in portions]
        for job, result in self.crew.run(jobs, ask.state, ask.carried):
            if isinstance(result, Result):
                self._staged.update(result.staged)
                yield from result.parts
            else:
                yield _lost(job, result, ends)

    def _job(self, ask: Ask, positions: range, ends: float | None, train: bool) -> Job:
        clients = [(ask.cohort[p], self.states.get(ask.cohort[p])) for p in positions]
        return Job(positions[0], clients, ask.context, train, ends, self.method)

    def keep_in(self, folder: Path) -> None:
        self.states.close()
        self.states = ClientStates(folder / "states.sqlite", self.states.memory)

    def settle(self, counted: Collection[str]) -> None:
        self.states.put(self._round, {client: self._staged[client] for client in counted if self._staged.get(client)})
        self._staged = {}

    def snapshot(self) -> Mapping[str, int]:
        noted = self.states.keep()
        return {KEPT: noted} if noted else {}

    def restore(self, note: Mapping[str, int]) -> None:
        self.states.restore(note.get(KEPT, 0))
        self._staged = {}

    def close(self) -> None:
        self.crew.close()
        self.states.close()


def portions(count: int, method: Method, workers: int, *, alone: bool = False) -> list[range]:
    """The positions of a cohort that go into one job each.

    In blocks, where bits depend on it, it does not depend on the workers: even jobs of about a block, of whole leaves
    where blocks and leaves divide each other. Lean: whole leaves as long as there is one for every worker; the rest
    client by client, so that none idles. Lean and ``alone``, all go one by one: under a deadline a client that hangs
    must not take others with it.
    """
    if method.engine != "lean":
        leaves = count > 2 * LEAF and (method.block % LEAF == 0 or LEAF % method.block == 0)
        unit, size = (LEAF, max(LEAF, method.block)) if leaves else (1, method.block)
        units, pieces = -(-count // unit), -(-count // size)
        ends = [units * (i + 1) // pieces for i in range(pieces)]
        return [range(count)[unit * start : unit * end] for start, end in zip([0, *ends], ends, strict=False)]
    whole = 0 if alone else -(-count // LEAF) if workers == 1 else count // LEAF // workers * workers
    first = [range(count)[LEAF * i : LEAF * (i + 1)] for i in range(whole)]
    return first + [range(position, position + 1) for position in range(LEAF * whole, count)]


def _lost(job: Job, died: Died, ends: float | None) -> Part:
    late = ends is not None and time.monotonic() >= ends
    why = LATE if late else _why({"": died})[""]
    failures = [Failure(name, job.context.round, f"client {name!r} {why}") for name, _ in job.clients]
    return Part(job.position, None, (), failures)


def _why(lost: Mapping[str, Died]) -> dict[str, str]:
    return {client: f"brought its worker process down ({died.reason})" for client, died in lost.items()}
