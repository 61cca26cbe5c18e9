"""Which engine is the fastest here: a few clients trained by each, on the real data and model, and thrown away.

An engine is a candidate only if its first step is the lean engine's; one that is refused is named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from shoal.client.data import Shard
from shoal.client.net import Net, build_module
from shoal.client.participant import Participant
from shoal.protos.errors import ShoalError
from shoal.server.fleet import Ask
from shoal.simulations.blocks import BlockParticipant, EngineName, Method, row
from shoal.simulations.engine import Assignment, Job, Result
from shoal.simulations.fleet import LEAN, SimulatedFleet, one_thread, portions
from shoal.strategies.base import Update, vector

__all__ = ["Plan", "plan", "refusal"]

BLOCKS = (2, 4, 8, 16, 32, 64, 128)  # beyond, a block gains less than its memory costs
MEMORY = 2**27  # bytes of weights in one block
CLOSE = {"float32": 1e-4, "float64": 1e-10}  # relative difference of one step from the lean engine's
ENGINES: tuple[EngineName, ...] = ("fused", "captured")
PATIENCE, SHARE = 2.0, 0.2  # no candidate is begun after so many seconds, or this share of the run's time
SHORT = 2.0  # seconds: a run that the lean engine does in less is not worth measuring


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why: seconds per client-step on one worker for each candidate, reasons for those refused."""

    method: Method
    workers: int
    measured: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for people: ``fused:64 × 2 workers, 9.1 µs/client-step; lean 61``."""
        where = f" × {self.workers} workers" if self.workers > 1 else ""
        cost = self.measured.get(str(self.method))
        first = f"{self.method}{where}" + ("" if cost is None else f", {_micro(cost)} µs/client-step")
        engines = {name.partition(":")[0] for name in self.measured} - {self.method.engine}
        best = {e: min(s for name, s in self.measured.items() if name.partition(":")[0] == e) for e in engines}
        others = [f"{engine} {_micro(seconds)}" for engine, seconds in sorted(best.items())]
        return "; ".join([first, *others, *(f"{engine}: {reason}" for engine, reason in self.refused.items())])


def plan(fleet: SimulatedFleet, ask: Ask, engine: str = "auto", rounds: int = 1) -> Plan:
    """The fastest of all engines for a run of ``rounds``, or the best block for the one that is named and not refused.

    Results are not touched: what is trained here is thrown away. Measuring takes at most a fifth of the time that the
    lean engine would need for the run.
    """
    unfit = {name: _unfit(fleet.assignment, ask, name) for name in ENGINES}
    refused: dict[str, str] = {name: reason for name, reason in unfit.items() if reason is not None}
    if engine == "auto" and len(refused) == len(ENGINES):
        return Plan(LEAN, fleet.crew.workers, {}, refused)
    measure = _Measure(fleet, ask, rounds, engine != "auto")
    if engine == "auto" and not measure.worthwhile():
        return Plan(LEAN, fleet.crew.workers)
    for name in ENGINES:
        if name in refused or engine not in ("auto", name) or not (engine == name or measure.worthwhile()):
            continue
        reason = refusal(fleet.assignment, ask, name)
        if reason is None:
            measure.blocks(name, vector(ask.state, "parameters"))
        else:
            refused[name] = reason
    found = {method: s for method, s in measure.found.items() if engine in ("auto", method.engine)}
    workers = fleet.crew.workers
    best = min(found, key=lambda method: found[method] * _longest(portions(len(ask.cohort), method.block), workers))
    measured = {str(method): seconds for method, seconds in measure.found.items()}
    return Plan(best, workers, measured, refused)


class _Measure:
    """Trains clients of the first cohort with one method after the other; ``found`` has seconds per client-step."""

    def __init__(self, fleet: SimulatedFleet, ask: Ask, rounds: int, named: bool) -> None:
        self._crew, self._ask, began = fleet.crew, ask, time.monotonic()
        self.found: dict[Method, float] = {}
        lean = self._train(LEAN, 1, tries=2)
        run = lean * len(ask.cohort) * rounds / self._crew.workers if lean < float("inf") else 0.0
        patience = min(PATIENCE, SHARE * run) if run > SHORT else 0.0
        self._ends = began + (PATIENCE if named else patience)  # who names an engine wants its best block
        if self.worthwhile():
            self._train(LEAN, 1)

    def worthwhile(self) -> bool:
        """Whether there is time for another candidate."""
        return time.monotonic() < self._ends

    def blocks(self, engine: EngineName, parameters: Tensor) -> None:
        """Larger and larger blocks, as long as these gain and there is time."""
        most = min(-(-len(self._ask.cohort) // self._crew.workers), MEMORY // max(1, parameters.nbytes), BLOCKS[-1])
        least = float("inf")
        for size in sorted({min(size, max(most, 1)) for size in BLOCKS}):
            self._train(Method(engine, size), size)
            seconds = self.found[Method(engine, size)]
            if seconds > 1.1 * least or not self.worthwhile():
                break
            least = min(least, seconds)

    def _train(self, method: Method, clients: int, tries: int = 10) -> float:
        """Seconds for a client, all workers being busy: the slowest's, of the best of some tries."""
        names = [(client, None) for client in self._ask.cohort[:clients]]
        job = Job(0, names, self._ask.context, method=method)
        best, steps, began = float("inf"), 1.0, time.monotonic()
        for tried in range(tries):  # the first makes the programs
            results = [r for _, r in self._crew.run([job] * self._crew.workers, self._ask.state, self._ask.carried)]
            done = [result for result in results if isinstance(result, Result)]
            steps = sum(report.numbers["steps"] for part in done[0].parts for report in part.reports) if done else 0.0
            if len(done) < len(results) or not steps:
                break
            best, spent = min(best, max(result.seconds for result in done)), time.monotonic() - began
            if spent > 0.5 or (tried and spent > 0.1):
                break
        self.found[method] = best / steps if steps else float("inf")
        return best / clients


def _unfit(assignment: Assignment, ask: Ask, engine: EngineName) -> str | None:
    """Why an engine is not even to be tried."""
    local = assignment.local
    if assignment.client is not None:
        return "clients train in a fit of their own"
    if ask.deadline is not None:
        return "there is a deadline, so clients must not wait for each other"
    if engine == "fused" and (local.optimizer != "sgd" or local.momentum or local.clip is not None):
        return "the optimizer is not plain SGD"
    return None


def refusal(assignment: Assignment, ask: Ask, engine: EngineName) -> str | None:
    """Why these clients cannot be played in blocks; None if they can: then the first step is the lean engine's."""
    if (reason := _unfit(assignment, ask, engine)) is not None:
        return reason
    try:
        with one_thread():
            return _differs(replace(assignment, local=replace(assignment.local, steps=1)), ask, engine)
    except ShoalError as error:
        return str(error)
    except Exception as error:  # of PyTorch, on a model that the lean engine trains
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _differs(a: Assignment, ask: Ask, engine: EngineName) -> str | None:
    """Two clients by either engine; what the lean engine cannot do either is not held against this one."""
    net, round = Net(build_module(a.make_model, a.seed, a.dtype), a.device), ask.context.round
    lean = Participant(net, a.strategy, a.local, a.seed)
    sent, clients, shards, expected = lean.place(a.strategy.send(ask.state)), list[str](), list[Shard](), list[Update]()
    for client in ask.cohort[:2]:
        try:
            shard = a.data.shard(client)
            expected.append(lean.train(client, round, shard, sent, ask.carried, None)[0])
        except Exception:
            continue
        clients.append(client)
        shards.append(shard)
    blocks = BlockParticipant(net, a.strategy, a.local, a.seed, fuse=engine == "fused")
    if not clients:
        return "none of the first clients can be trained"
    found, _ = blocks.train(clients, round, shards, sent, ask.carried, [None] * len(clients))
    for k, update in enumerate(expected):
        for name, mine, theirs in _pairs(row(found, k), update):
            if not (mine - theirs).norm() <= CLOSE[a.dtype] * theirs.norm().clamp(min=1e-6):
                return f"its {name} after one step differs from the lean engine's"
    return None


def _pairs(a: Update, b: Update) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield "weights", a.delta.cpu(), b.delta
    for name in b.tensors:
        yield name, a.tensors[name].cpu(), b.tensors[name]
    if a.buffers is not None and b.buffers is not None:
        yield "buffers", a.buffers.cpu(), b.buffers


def _longest(jobs: Sequence[range], workers: int) -> int:
    """Clients of the busiest worker."""
    loads = [0] * workers
    for job in sorted(jobs, key=len, reverse=True):
        loads[loads.index(min(loads))] += len(job)
    return max(loads)


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}" if seconds < 1e-3 else f"{1e6 * seconds:,.0f}"
