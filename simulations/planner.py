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
from shoal.protos.errors import ExperimentError, ShoalError
from shoal.server.fleet import Ask
from shoal.simulations.blocks import BlockParticipant, Engine, Method, row
from shoal.simulations.crew import Died
from shoal.simulations.engine import Assignment, Job, Result
from shoal.simulations.fleet import LEAN, SimulatedFleet, one_thread, portions
from shoal.strategies.base import Update, vector
from shoal.strategies.sums import LEAF

__all__ = ["Plan", "plan", "refusal"]

BLOCKS = (8, 16, 32, 64, 128)  # beyond, a block gains less than its memory costs
MEMORY = 2**27  # bytes of weights in one block
CLOSE = {"float32": 1e-4, "float64": 1e-10}  # relative difference of one step from the lean engine's
ENGINES: tuple[Engine, ...] = ("fused", "captured")
PATIENCE = 2.0  # seconds after which no further candidate is begun


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why: seconds per client-step on one worker for each candidate, reasons for those refused."""

    method: Method
    workers: int
    measured: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for people: ``fused K=64 × 2 workers, 9.1 µs/client-step; lean 61``."""
        where = f" × {self.workers} workers" if self.workers > 1 else ""
        first = f"{self.method}{where}, {_micro(self.measured[str(self.method)])} µs/client-step"
        engines = {name.partition(" ")[0] for name in self.measured} - {self.method.engine}
        best = {e: min(s for name, s in self.measured.items() if name.partition(" ")[0] == e) for e in engines}
        others = [f"{engine} {_micro(seconds)}" for engine, seconds in sorted(best.items())]
        return "; ".join([first, *others, *(f"{engine}: {reason}" for engine, reason in self.refused.items())])


def plan(fleet: SimulatedFleet, ask: Ask, engine: str = "auto") -> Plan:
    """The fastest of all engines, or the best way to use the one that is named.

    Results are not touched: what is trained here is thrown away. ExperimentError if the named engine is refused.
    """
    measure, refused = _Measure(fleet, ask), dict[str, str]()
    measure.try_(LEAN, 1)
    for name in ENGINES:
        if engine not in ("auto", name):
            continue
        reason = refusal(fleet.assignment, ask, name)
        if reason is None:
            measure.blocks(name, vector(ask.state, "parameters"))
        elif engine == "auto":
            refused[name] = reason
        else:
            raise ExperimentError(f"engine {name!r} cannot run this experiment: {reason}; use engine 'auto' or 'lean'")
    found = {method: s for method, s in measure.found.items() if engine in ("auto", method.engine)}
    best = min(found, key=lambda method: found[method])
    size = _job(len(ask.cohort), best, fleet.crew.workers)
    measured = {str(method): seconds for method, seconds in measure.found.items()}
    return Plan(replace(best, job=size), fleet.crew.workers, measured, refused)


class _Measure:
    """Trains clients of the first cohort with one method after the other; ``found`` has seconds per client-step."""

    def __init__(self, fleet: SimulatedFleet, ask: Ask) -> None:
        self._crew, self._ask, self._ends = fleet.crew, ask, time.monotonic() + PATIENCE
        self.found: dict[Method, float] = {}

    def try_(self, method: Method, clients: int) -> float:
        """With all workers busy, the slowest counts; of some tries, of which the first makes the programs, the best."""
        names = [(client, None) for client in self._ask.cohort[:clients]]
        job = Job(0, names, self._ask.context, method=replace(method, job=clients))
        best, tries, began = float("inf"), 0, time.monotonic()
        while tries < 2 or (tries < 10 and time.monotonic() - began < 0.1):
            results = self._crew.run([job] * self._crew.workers, self._ask.state, self._ask.carried)
            best, tries = min(best, max(_per_step(result) for _, result in results)), tries + 1
            if time.monotonic() - began > 0.5:
                break
        self.found[method] = best
        return best

    def blocks(self, engine: Engine, parameters: Tensor) -> None:
        """Larger and larger blocks, as long as these gain."""
        most = min(-(-len(self._ask.cohort) // self._crew.workers), MEMORY // max(1, parameters.nbytes), BLOCKS[-1])
        sizes, least = sorted({min(size, most) for size in BLOCKS}), self.found[LEAN]
        for size in [size for size in sizes if size > 1]:
            seconds = self.try_(Method(engine, size), size)
            if seconds > 1.1 * least or time.monotonic() > self._ends:
                break
            least = min(least, seconds)


def _per_step(result: Result | Died) -> float:
    steps = 0.0
    if isinstance(result, Result):
        steps = sum(report.numbers["steps"] for part in result.parts for report in part.reports)
    return result.seconds / steps if isinstance(result, Result) and steps else float("inf")


def refusal(assignment: Assignment, ask: Ask, engine: Engine) -> str | None:
    """Why these clients cannot be played in blocks; None if they can: then the first step is the lean engine's."""
    local = assignment.local
    if assignment.client is not None:
        return "clients train in a fit of their own"
    if engine == "fused" and (local.optimizer != "sgd" or local.momentum or local.clip is not None):
        return "the optimizer is not plain SGD"
    if ask.deadline is not None:
        return "there is a deadline, so clients must not wait for each other"
    try:
        with one_thread():
            return _differs(replace(assignment, local=replace(local, steps=1)), ask, engine)
    except ShoalError as error:
        return str(error)
    except Exception as error:  # of PyTorch, on a model that the lean engine trains
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _differs(a: Assignment, ask: Ask, engine: Engine) -> str | None:
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


def _job(cohort: int, method: Method, workers: int) -> int:
    """How many clients go into a job: whole leaves, unless these would leave a worker idle for long."""
    if method.engine == "lean":
        return LEAF
    leaves = -(-method.block // LEAF) * LEAF
    even = -(-cohort // workers)
    return leaves if _longest(portions(cohort, leaves), workers) <= 1.1 * even else even


def _longest(jobs: Sequence[range], workers: int) -> int:
    """Clients of the busiest worker."""
    loads = [0] * workers
    for job in sorted(jobs, key=len, reverse=True):
        loads[loads.index(min(loads))] += len(job)
    return max(loads)


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}" if seconds < 1e-3 else f"{1e6 * seconds:,.0f}"
