"""Which engine is the fastest here: a few clients trained by each, on the real data and model, and thrown away.

An engine is a candidate only if its first step is the lean engine's; one that is refused is named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
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

BLOCKS = (4, 16, 64, 128)
LARGEST = BLOCKS[-1]  # beyond, a block gains less than its memory costs
MEMORY = 2**25  # bytes of weights in one block
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}  # relative difference of one step from the lean engine's
ROUNDINGS = 4.0  # of a weight in a step, which may add several parts to it one after the other
BLIND = 1e-2  # no difference beyond this is put down to rounding
ENGINES: tuple[EngineName, ...] = ("fused", "captured")
PATIENCE, SHARE = 2.0, 0.2  # no candidate is begun after so many seconds, or this share of the run's time
CLIMBS = {"fused": 0.4, "captured": 0.7}  # by which share of that time no larger block is begun
FINALS, NEAR = 5, 1.2  # the best are tried again so often; who takes this much longer is out
HOPELESS = 1.5  # who takes this much longer than the best is out at once
GAIN = 1.05  # how much longer the lean engine may take and still be chosen
LONG = 0.02  # seconds of a measurement
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
    race = _Race(fleet, ask, rounds, engine != "auto")
    if engine == "auto" and not race.worthwhile():
        return Plan(LEAN, fleet.crew.workers)
    for name in ENGINES:
        if name in refused or engine not in ("auto", name) or not (engine == name or race.worthwhile()):
            continue
        reason = refusal(fleet.assignment, ask, name)
        if reason is None:
            race.climb(name, CLIMBS[name])
        else:
            refused[name] = reason
    best = race.finals(lambda method: engine in ("auto", method.engine))
    measured = {str(method): seconds for method, seconds in race.found.items()}
    return Plan(best, fleet.crew.workers, measured, refused)


class _Race:
    """Trains clients of the first cohort with one method after the other; ``found`` has seconds per client-step.

    Blocks grow by fours as long as that pays. Then those that are not far behind, and blocks half and twice as large as
    the best, run again and again in turns, so that what else the machine does meets all of them alike; each one's best
    time counts.
    """

    def __init__(self, fleet: SimulatedFleet, ask: Ask, rounds: int, named: bool) -> None:
        self._crew, self._ask, self._began = fleet.crew, ask, time.monotonic()
        clients, parameters = len(ask.cohort), vector(ask.state, "parameters")
        self._most = max(1, min(-(-clients // self._crew.workers), MEMORY // max(1, parameters.nbytes), LARGEST))
        self.found: dict[Method, float] = {}
        lean = self._first(LEAN)
        run = lean * clients * rounds / self._crew.workers if lean < float("inf") else 0.0
        # Who names an engine wants its best block.
        self._patience = PATIENCE if named else min(PATIENCE, SHARE * run) if run > SHORT else 0.0
        if self.worthwhile():
            self._again(LEAN)

    def worthwhile(self, share: float = 1.0) -> bool:
        """Whether there is time for another candidate within a share of all that there is."""
        return time.monotonic() < self._began + share * self._patience

    def climb(self, engine: EngineName, share: float) -> None:
        """Larger and larger blocks; one that takes much longer than the best so far ends it."""
        least = float("inf")
        for size in sorted({min(size, self._most) for size in BLOCKS}):
            method = Method(engine, size)
            self._first(method)
            if self.found[method] < HOPELESS * min(self.found.values()) or least == float("inf"):
                self._again(method)
            worse = self.found[method] > min(NEAR * least, HOPELESS * min(self.found.values()))
            if worse or not self.worthwhile(share):
                break
            least = min(least, self.found[method])

    def finals(self, among: Callable[[Method], bool]) -> Method:
        """The fastest for the whole cohort; lean, which takes the least memory, where hardly anything is gained."""
        for _ in range(FINALS):
            best = min(filter(among, self.found), key=self._whole)
            close = [m for m in self.found if among(m) and self._whole(m) <= NEAR * self._whole(best)]
            again = [*self._neighbours(best), *close]
            for method in again if len(again) > 1 else []:
                if self.worthwhile():
                    self._first(method) if method not in self.found else self._again(method)
        best = min(filter(among, self.found), key=self._whole)
        return LEAN if among(LEAN) and self._whole(LEAN) <= GAIN * self._whole(best) else best

    def _neighbours(self, best: Method) -> list[Method]:
        """Blocks half and twice as large that have not been tried."""
        sizes = {best.block // 2, min(2 * best.block, self._most)} if best.engine != "lean" else ()
        return [m for m in (replace(best, block=size) for size in sizes) if m.block and m not in self.found]

    def _whole(self, method: Method) -> float:
        """Its time for the whole cohort: that of the busiest worker."""
        loads = [0] * self._crew.workers
        for job in sorted(portions(len(self._ask.cohort), method, self._crew.workers), key=len, reverse=True):
            loads[loads.index(min(loads))] += len(job)
        return self.found[method] * max(loads)

    def _first(self, method: Method) -> float:
        """Seconds for a client of the first job, in which programs are made."""
        seconds, steps = self._job(method)
        self.found[method] = seconds / steps if steps else float("inf")
        return seconds / method.block

    def _again(self, method: Method) -> None:
        """Some jobs, since a single small one is too short to be compared."""
        seconds, steps = 0.0, 0.0
        while seconds < LONG:
            more = self._job(method)
            if not more[1]:
                return
            seconds, steps = seconds + more[0], steps + more[1]
        self.found[method] = min(self.found[method], seconds / steps)

    def _job(self, method: Method) -> tuple[float, float]:
        """Seconds and steps of one block, all workers being busy: the slowest's; no steps if it fails."""
        names = [(client, None) for client in self._ask.cohort[: method.block]]
        job = Job(0, names, self._ask.context, method=method)
        results = [r for _, r in self._crew.run([job] * self._crew.workers, self._ask.state, self._ask.carried)]
        done = [result for result in results if isinstance(result, Result)]
        if len(done) < len(results):
            return float("inf"), 0.0
        steps = sum(report.numbers["steps"] for part in done[0].parts for report in part.reports)
        return max(result.seconds for result in done), steps


def _unfit(assignment: Assignment, ask: Ask, engine: EngineName) -> str | None:
    """Why an engine is not even to be tried."""
    local = assignment.local
    if assignment.client is not None:
        return "clients train in a fit of their own"
    if vector(ask.state, "parameters").numel() == 1:
        return "in a block the vectors of a model of one parameter look like numbers"
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
            return _differs(replace(assignment, local=replace(assignment.local, steps=1, stragglers=0.0)), ask, engine)
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
        allowed = _allowed(update.delta, sent.parameters)
        for name, mine, theirs in _pairs(row(found, k), update):
            if not (mine - theirs).norm() <= allowed * theirs.norm().clamp(min=1e-6):
                return f"its {name} after one step differs from the lean engine's"
    return None


def _allowed(delta: Tensor, start: Tensor) -> float:
    """The relative difference that rounding explains: a step may be small beside the weights that it changes."""
    info = torch.finfo(delta.dtype)
    lost = ROUNDINGS * info.eps * float(start.norm() / delta.norm().clamp(min=info.tiny))
    return CLOSE[delta.dtype] + min(lost, BLIND)


def _pairs(a: Update, b: Update) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield "weights", a.delta.cpu(), b.delta
    for name in b.tensors:
        yield name, a.tensors[name].cpu(), b.tensors[name]
    if a.buffers is not None and b.buffers is not None:
        yield "buffers", a.buffers.cpu(), b.buffers


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}" if seconds < 1e-3 else f"{1e6 * seconds:,.0f}"
