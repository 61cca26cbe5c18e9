"""The lean engine: plays the clients of whole leaves, one after the other, on one resident net.

An engine lives in one single-threaded process. It is given the server's state and works out what is sent, what each
client returns and what that contributes, so only sums leave the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.client.client import Client
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net
from shoal.client.participant import Participant, failure
from shoal.protos import seeds
from shoal.protos.messages import Failure
from shoal.server.fleet import Part, Report
from shoal.simulations.federated import FederatedData
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Update
from shoal.strategies.sums import Carried, Contribution, contribute, plus

__all__ = ["Assignment", "Engine", "Job", "Result", "build_module"]


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


def build_module(make_model: Callable[[], nn.Module], seed: int, dtype: str) -> nn.Module:
    """The model with the seed's initial weights, the same in every process; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.integer(seed, "model"))
        module = make_model()
    return module.to(getattr(torch, dtype))


class Engine:
    """Runs jobs against the state of one round."""

    def __init__(self, assignment: Assignment) -> None:
        module = build_module(assignment.make_model, assignment.seed, assignment.dtype)
        self._net = Net(module, assignment.device)
        self._strategy, self._data = assignment.strategy, assignment.data
        self._participant = Participant(
            self._net, assignment.strategy, assignment.local, assignment.seed, assignment.client
        )
        self._device = torch.device(assignment.device)

    def run(self, job: Job, state: State, carried: Carried, seconds: float | None = None) -> Result:
        """Train or evaluate the job's clients; one that fails, or was not begun in time, is reported, never raised."""
        began, sent = time.monotonic(), self._sent(state)
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
            reports.append(Report(client, _numbers(update, sent, carried)))
            staged[client] = after
        return Result(Part(job.position, total, reports, failures), staged)

    def _sent(self, state: State) -> Sent:
        sent = self._strategy.send(state)
        return Sent(self._here(sent.parameters), self._all_here(sent.tensors), sent.settings)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)

    def _all_here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._here(tensor) for name, tensor in tensors.items()}

    def _shard(self, shard: Shard) -> Shard:
        kind = self._net.dtype if shard.x.is_floating_point() else shard.x.dtype
        return Shard(shard.x.to(self._device, kind), self._here(shard.y))

    def _train(self, client: str, round: int, sent: Sent, carried: Carried, mine: Mine | None) -> tuple[Update, Mine]:
        before = None if mine is None else self._all_here(mine)
        shard = self._shard(self._data.shard(client))
        update, after = self._participant.train(client, round, shard, sent, carried, before)
        return update.map(Tensor.cpu), {name: tensor.cpu() for name, tensor in after.items()}

    def _evaluate(self, client: str, sent: Sent, carried: Carried, mine: Mine | None) -> list[Report]:
        held_out = self._data.shard(client).held_out
        if held_out is None:  # a client with no examples of its own to test on has nothing to say
            return []
        before = None if mine is None else self._all_here(mine)
        return [Report(client, self._participant.evaluate(self._shard(held_out), sent, carried, before))]


def _numbers(update: Update, sent: Sent, carried: Carried) -> dict[str, float]:
    """A client's line: its work, the bytes that its task and answer have on a wire, its own metrics."""
    down = [sent.parameters, *sent.tensors.values(), carried.buffers, carried.counters]
    up = [update.delta, *update.tensors.values(), carried.buffers, carried.counters]
    return {
        **update.metrics,
        "examples": float(update.examples),
        "steps": float(update.steps),
        "lr_sum": float(update.lr_sum),
        "bytes_down": float(sum(tensor.nbytes for tensor in down)),
        "bytes_up": float(sum(tensor.nbytes for tensor in up)),
    }
