"""An engine: plays the clients of a job on one resident net, one after the other or in blocks.

An engine lives in one single-threaded process. It is given the server's state and works out what is sent, what each
client returns and what that contributes, so only sums leave the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from shoal.client.client import Client
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net, build_module
from shoal.client.participant import Participant, failure
from shoal.protos.messages import Failure
from shoal.server.fleet import Part, Report
from shoal.simulations.blocks import BlockParticipant, Method, blocks, columns, row
from shoal.simulations.federated import FederatedData
from shoal.simulations.step import Unsuitable
from shoal.strategies.base import Context, Mine, State, Strategy, Update
from shoal.strategies.sums import LEAF, Carried, Contribution, RunningSum, contribute, contributions

__all__ = ["LATE", "Assignment", "Engine", "Job", "Result"]


LATE = "did not answer before the deadline"


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
    monotonic clock. Clients that are ``lost`` are not touched: they have failed, and how.
    """

    position: int
    clients: Sequence[tuple[str, Mine | None]]
    context: Context
    train: bool = True
    ends: float | None = None
    method: Method = Method()
    lost: Mapping[str, str] = field(default_factory=dict)

    def left(self) -> float | None:
        """Seconds until the deadline, for a process whose clock may be another."""
        return None if self.ends is None else self.ends - time.monotonic()


@dataclass(frozen=True)
class Result:
    """A job's parts of the round, and the clients' new states, not yet settled; ``seconds`` it took."""

    parts: Sequence[Part]
    staged: Mapping[str, Mine] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What one client's training gave."""

    contribution: Contribution
    report: Report
    mine: Mine


Outcome = Trained | Failure


class Engine:
    """Runs jobs against the state of one round."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment, a = assignment, assignment
        net = Net(build_module(a.make_model, a.seed, a.dtype), a.device)
        self.participant = Participant(net, a.strategy, a.local, a.seed, a.client)
        fused, captured = (BlockParticipant(net, a.strategy, a.local, a.seed, fuse=fuse) for fuse in (True, False))
        self.stacked = {"fused": fused, "captured": captured}

    def run(self, job: Job, state: State, carried: Carried, seconds: float | None = None) -> Result:
        """Train or evaluate the job's clients; one that fails, or was not begun in time, is reported, never raised."""
        began = time.monotonic()
        task = _Task(self, job, state, carried, None if seconds is None else began + seconds)
        if not job.train:
            return Result([task.evaluate()])
        parts, staged = _summed(job.position, [name for name, _ in job.clients], task.train())
        return Result(parts, staged, time.monotonic() - began)


class _Task:
    """One job being done."""

    def __init__(self, engine: Engine, job: Job, state: State, carried: Carried, ends: float | None) -> None:
        self._engine, self._job, self._state, self._carried, self._ends = engine, job, state, carried, ends
        self._data, self._strategy = engine.assignment.data, engine.assignment.strategy
        self._round = job.context.round
        self._sent = engine.participant.place(self._strategy.send(state))
        self._clients = job.clients

    def evaluate(self) -> Part:
        reports, failures = list[Report](), list[Failure]()
        for client, mine in self._clients:
            try:
                shard, participant = self._data.shard(client), self._engine.participant
                measured = participant.evaluate(client, self._round, shard, self._sent, self._carried, mine)
                if measured:  # a client with no examples of its own to test on has nothing to say
                    reports.append(Report(client, measured))
            except Exception as error:
                failures.append(failure(error, client, self._round))
        return Part(self._job.position, None, reports, failures)

    def train(self) -> Iterator[Outcome]:
        """Each client's outcome, in the job's order."""
        if self._job.method.engine == "lean":
            yield from map(self._alone, range(len(self._clients)))
            return
        outcomes = dict[int, Outcome]()
        shards = dict[int, Shard]()
        for k, (client, _) in enumerate(self._clients):
            if client in self._job.lost:
                outcomes[k] = Failure(client, self._round, f"client {client!r} {self._job.lost[client]}")
                continue
            try:
                shards[k] = self._data.shard(client)
            except Exception as error:
                outcomes[k] = failure(error, client, self._round)
        due = 0
        for members in blocks(shards, self._job.method.block):
            outcomes.update(zip(members, self._together(members, shards), strict=True))
            while due in outcomes:  # at once, while it is in the cache
                yield outcomes.pop(due)
                due += 1

    def _late(self, k: int) -> Failure | None:
        client = self._clients[k][0]
        late = self._ends is not None and time.monotonic() > self._ends
        return Failure(client, self._round, f"client {client!r} {LATE}") if late else None

    def _alone(self, k: int) -> Outcome:
        """One client on the lean engine."""
        if (late := self._late(k)) is not None:
            return late
        client, mine = self._clients[k]
        try:
            shard = self._data.shard(client)
            update, after = self._engine.participant.train(client, self._round, shard, self._sent, self._carried, mine)
            part = contribute(self._strategy, self._state, update, self._job.context)
        except Exception as error:
            return failure(error, client, self._round)
        return Trained(part, Report.of(client, update, *self._bytes(update)), after)

    def _together(self, members: Sequence[int], shards: Mapping[int, Shard]) -> list[Outcome]:
        """Some clients as a block; each for itself if that fails, so that only the culprit does."""
        if (late := self._late(members[0])) is not None:
            return [replace(late, client=self._clients[k][0]) for k in members]
        try:
            return self._block(members, shards)
        except Unsuitable:
            return [self._alone(k) for k in members]  # a batch of a kind that cannot be stacked
        except Exception as error:
            if len(members) == 1:
                return [failure(error, self._clients[members[0]][0], self._round)]
            return [self._together([k], shards)[0] for k in members]

    def _block(self, members: Sequence[int], shards: Mapping[int, Shard]) -> list[Outcome]:
        names, minds = zip(*(self._clients[k] for k in members), strict=True)
        participant = self._engine.stacked[self._job.method.engine]
        given = [shards[k] for k in members]
        update, after = participant.train(names, self._round, given, self._sent, self._carried, minds)
        wrong = participant.problems(update, self._sent, names, self._round)
        parts = contributions(self._strategy, self._state, update, self._job.context)
        numbers, (down, up) = columns(update), self._bytes(row(update, 0))
        outcomes = list[Outcome]()
        for k, (client, part) in enumerate(zip(names, parts, strict=True)):
            report = Report(client, numbers[k] | {"bytes_down": down, "bytes_up": up})
            mine = {name: tensor[k].cpu().clone() for name, tensor in after.items()}
            outcomes.append(failure(wrong[k], client, self._round) if k in wrong else Trained(part, report, mine))
        return outcomes

    def _bytes(self, update: Update) -> tuple[int, int]:
        """What the tensors of the task and of one client's answer have on a wire."""
        sent, carried = self._sent, [self._carried.buffers, self._carried.counters]
        down = sum(tensor.nbytes for tensor in [sent.parameters, *sent.tensors.values(), *carried])
        return down, sum(tensor.nbytes for tensor in [update.delta, *update.tensors.values(), *carried])


def _summed(position: int, clients: Sequence[str], outcomes: Iterable[Outcome]) -> tuple[list[Part], dict[str, Mine]]:
    """Parts that the round's sum can take: from the first position of a leaf on their sum, else single positions."""
    parts, staged = list[Part](), dict[str, Mine]()
    first, sums, reports, failures = position, RunningSum(), list[Report](), list[Failure]()
    waiting = iter(outcomes)
    for at, client in enumerate(clients, start=position):
        outcome = next(waiting)
        if at % LEAF == 0 and at > first:
            parts.append(Part(first, sums.total, reports, failures))
            first, sums, reports, failures = at, RunningSum(), [], []
        if isinstance(outcome, Trained):
            staged[client] = outcome.mine
        if first % LEAF:
            parts.append(_single(at, outcome))
            first = at + 1
        elif isinstance(outcome, Trained):
            sums.add(outcome.contribution)
            reports.append(outcome.report)
        else:
            failures.append(outcome)
        del outcome  # its memory is the next block's
    if first < position + len(clients):
        parts.append(Part(first, sums.total, reports, failures))
    return parts, staged


def _single(at: int, outcome: Outcome) -> Part:
    """As it was contributed: whoever adds it to a leaf that has begun must do so as an engine would."""
    if isinstance(outcome, Failure):
        return Part(at, None, (), [outcome])
    return Part(at, outcome.contribution, [outcome.report])
