"""The engine's workers: a round's jobs spread over processes, its state in memory that all of them see.

A worker that dies takes down neither the run nor its neighbours' clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from shoal.simulations.answers import Answers
from shoal.simulations.crew import Crew, Died
from shoal.simulations.engine import Assignment, Job, Result
from shoal.simulations.packing import pack
from shoal.simulations.shared import SharedBlock, SharedMemory
from shoal.strategies.base import State
from shoal.strategies.sums import Carried

__all__ = ["WORKER", "Order", "Pool"]

WORKER = "shoal.simulations.worker"  # the program

GRACE = 0.5  # seconds after the deadline: for the answer of a worker that kept it


@dataclass(frozen=True)
class Order:
    """A job and where its state lies: vectors in shared memory, numbers in the message. ``answer`` is lent for sums."""

    job: Job
    block: SharedBlock
    numbers: dict[str, float]
    seconds: float | None = None
    answer: SharedMemory | None = None


class Pool:
    """A fixed number of engines, each in a process of its own."""

    def __init__(self, assignment: Assignment, workers: int) -> None:
        packed, self._data = pack(assignment)
        self._block: SharedBlock | None = None
        self._answers = Answers()
        try:
            self._crew = Crew(WORKER, packed, workers)
            self._crew.ready()
        except BaseException:
            self._data.close()
            raise
        self.workers = workers

    def run(self, jobs: Sequence[Job], state: State, carried: Carried) -> Iterator[tuple[Job, Result | Died]]:
        """Each job's result as it comes. A worker busy well beyond the deadline is killed and replaced."""
        numbers = self._publish(state, carried)
        assert self._block is not None
        waiting, running, overdue = deque(jobs), dict[Future[Any], tuple[Job, SharedMemory | None]](), False
        # One more than a worker does at a time, so that none waits for this process; but not under a deadline, where
        # a job that has not begun is nobody's fault.
        most = self.workers * (2 if all(job.ends is None for job in jobs) else 1)
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    job = waiting.popleft()
                    if (left := job.left()) is not None and left <= 0:
                        yield job, Died("not begun before the deadline")
                        continue
                    lent = self._answers.lend()
                    running[self._crew.submit(Order(job, self._block, numbers, job.left(), lent))] = job, lent
                patience = _patience(job for job, _ in running.values()) if not overdue else None
                done, _ = wait(running, timeout=patience, return_when=FIRST_COMPLETED)
                if not done:
                    overdue = True  # once: what is running then is a replacement on its way
                    self._crew.kill(running)
                for future in done:
                    job, lent = running.pop(future)
                    yield job, self._opened(future.result(), lent)
        except BaseException:
            for future in running:
                future.cancel()
            self._crew.kill(running)  # the caller has lost interest: nothing may linger on an old round
            raise

    def _opened(self, answer: Any, lent: SharedMemory | None) -> Result | Died:
        if isinstance(answer, Died):
            self._answers.back(lent)
            return answer
        return cast(Result, self._answers.open(answer, lent))

    def _publish(self, state: State, carried: Carried) -> dict[str, float]:
        """Put the round's vectors where workers see them; the numbers are returned."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        tensors |= {"/buffers": carried.buffers, "/counters": carried.counters}
        if self._block is not None and self._block.fits(tensors):
            self._block.fill(tensors)
        else:
            self._block = SharedBlock.of(tensors)
        return {name: value for name, value in state.items() if not isinstance(value, Tensor)}

    def close(self) -> None:
        self._crew.close()
        self._data.close()
        self._answers.close()
        if self._block is not None:
            self._block.close()
            self._block = None


def _patience(jobs: Iterable[Job]) -> float | None:
    """Seconds to wait for workers, which end a job themselves at its deadline, unless a client hangs."""
    left = [seconds for job in jobs if (seconds := job.left()) is not None]
    return max(0.0, min(left) + GRACE) if left else None
