"""The lean engine: plays the clients of whole leaves, one after the other, on one resident net.

An engine lives in one single-threaded process. It is given the server's state and works out what is sent, what each
client returns and what that contributes, so only sums leave the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from shoal.client.client import Client
from shoal.client.local import LocalTraining
from shoal.client.net import Net, build_module
from shoal.client.participant import Participant, failure
from shoal.protos.messages import Failure
from shoal.server.fleet import Part, Report
from shoal.simulations.federated import FederatedData
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Update
from shoal.strategies.sums import Carried, Contribution, contribute, plus

__all__ = ["Assignment", "Engine", "Job", "Result"]


@dataclass(frozen=True)
class Assignment:
    """All that a process needs to play clients; sent to each worker once."""

    make_model: Callable[[], nn.Module]
    data: FederatedData
    strategy: Strategy
    local: LocalTraining
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    client: Client | None = None


@dataclass(frozen=True)
class Job:
    """Some clients from ``position`` of the cohort on, with the state each had settled.

    ``train`` False means: evaluate them on their held-out examples. ``ends`` is the deadline on this process's
    monotonic clock.
    """

    position: int
    clients: Sequence[tuple[str, Mine | None]]
    context: Context
    train: bool = True
    ends: float | None = None

    def left(self) -> float | None:
        """Seconds until the deadline, for a process whose clock may be another."""
        return None if self.ends is None else self.ends - time.monotonic()


@dataclass(frozen=True)
class Result:
    """A job's part of the round, and the clients' new states, not yet settled."""

    part: Part
    staged: Mapping[str, Mine] = field(default_factory=dict)


class Engine:
    """Runs jobs against the state of one round."""

    def __init__(self, assignment: Assignment) -> None:
        module = build_module(assignment.make_model, assignment.seed, assignment.dtype)
        self._strategy, self._data = assignment.strategy, assignment.data
        self._participant = Participant(
            Net(module, assignment.device), assignment.strategy, assignment.local, assignment.seed, assignment.client
        )

    def run(self, job: Job, state: State, carried: Carried, seconds: float | None = None) -> Result:
        """Train or evaluate the job's clients; one that fails, or was not begun in time, is reported, never raised."""
        began, sent = time.monotonic(), self._participant.place(self._strategy.send(state))
        total: Contribution | None = None
        reports, failures, staged = list[Report](), list[Failure](), dict[str, Mine]()
        for client, mine in job.clients:
            round = job.context.round
            if seconds is not None and time.monotonic() - began > seconds:
                failures.append(Failure(client, round, f"client {client!r} did not answer before the deadline"))
                continue
            try:
                if not job.train:
                    reports += self._evaluate(client, sent, carried, mine)
                    continue
                update, after = self._train(client, round, sent, carried, mine)
                part = contribute(self._strategy, state, update, job.context)
            except Exception as error:
                failures.append(failure(error, client, round))
                continue
            total = part if total is None else plus(total, part)
            reports.append(Report.of(client, update, *_bytes(sent, update, carried)))
            staged[client] = after
        return Result(Part(job.position, total, reports, failures), staged)

    def _train(self, client: str, round: int, sent: Sent, carried: Carried, mine: Mine | None) -> tuple[Update, Mine]:
        return self._participant.train(client, round, self._data.shard(client), sent, carried, mine)

    def _evaluate(self, client: str, sent: Sent, carried: Carried, mine: Mine | None) -> list[Report]:
        held_out = self._data.shard(client).held_out
        if held_out is None:  # a client with no examples of its own to test on has nothing to say
            return []
        return [Report(client, self._participant.evaluate(held_out, sent, carried, mine))]


def _bytes(sent: Sent, update: Update, carried: Carried) -> tuple[int, int]:
    """What the tensors of the task and of its answer have on a wire."""
    down = [sent.parameters, *sent.tensors.values(), carried.buffers, carried.counters]
    up = [update.delta, *update.tensors.values(), carried.buffers, carried.counters]
    return sum(tensor.nbytes for tensor in down), sum(tensor.nbytes for tensor in up)
