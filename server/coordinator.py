"""The coordinator: the one loop of rounds, over any fleet.

A round is select → ask → sum → finish → evaluate → record. The server's state is a value: a round that is abandoned
half way leaves the value of the round before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.protos import seeds
from shoal.protos.errors import RoundError
from shoal.protos.messages import Failure
from shoal.protos.parameters import Parameters, Segment
from shoal.server.callbacks import Callback, Start, Stop
from shoal.server.checkpoints import Checkpoint
from shoal.server.fleet import Ask, Fleet, Report, Round
from shoal.server.spread import Spread
from shoal.strategies.base import Context, Strategy, vector
from shoal.strategies.selectors import Selector
from shoal.strategies.sums import Carried, Contribution, LeafSum, carry

__all__ = ["Coordinator", "Plan", "Round", "start", "updates_needed"]

PORTION = 4096  # clients whose evaluations are passed on together
ROUNDING = 1e-9  # 100 × 1.1 is 110.00000000000001, which must not ask an 111th client
Evaluate = Callable[[Parameters[Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class Plan:
    """How rounds are run.

    ``cohort`` updates make a round; ``over_select`` ≥ 1 asks more clients and counts the first; a round
    stands with ``quorum`` (a share of the cohort) of them; ``deadline`` is in seconds. ``evaluate_every`` and
    ``evaluate_clients_every`` count rounds, 0 means never; the last round is always evaluated by what is on.
    """

    rounds: int
    cohort: int
    seed: int = 0
    quorum: float = 1.0
    over_select: float = 1.0
    deadline: float | None = None
    evaluate_every: int = 1
    evaluate_clients_every: int = 0
    checkpoint_every: int = 10


def updates_needed(quorum: float, cohort: int) -> int:
    """How many updates a round needs to stand."""
    return max(1, math.ceil(quorum * cohort - ROUNDING))


def start(strategy: Strategy, selector: Selector, initial: Parameters[Tensor]) -> Checkpoint:
    """The value before the first round."""
    return Checkpoint(
        round=0,
        state=strategy.init(initial.trainable),
        carried=Carried(initial.buffers, initial.counters),
        layout=initial.layout,
        frozen=initial.frozen,
        selector=selector.init(),
    )


class Coordinator:
    """Runs a plan from a checkpoint on. :attr:`point` is always the value after the last whole round."""

    def __init__(
        self,
        plan: Plan,
        strategy: Strategy,
        selector: Selector,
        fleet: Fleet,
        point: Checkpoint,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[Callback] = (),
        path: Path | None = None,
    ) -> None:
        self.plan, self.point = plan, point
        self._strategy, self._selector, self.fleet = strategy, selector, fleet
        self._evaluate, self._callbacks, self._path = evaluate, callbacks, path
        self.stopping = False
        self._kept = point.round or None  # a point beyond the start comes from a checkpoint
        self.committing = False  # while set, an interrupt must wait: point and client states change together
        fleet.restore(point.clients)
        self._remembering = [one for one in callbacks if type(one).remember is not Callback.remember]
        for callback, kept in zip(self._remembering, point.remembered, strict=False):  # none before a checkpoint
            callback.recall(kept)

    def stop(self) -> None:
        """Ask the run to end after the round in progress; safe in a signal handler."""
        self.stopping = True

    def run(self) -> Checkpoint:
        """Run to the plan's last round, or to where a callback or :meth:`stop` ends it; the state is always kept."""
        try:
            self._run()
        except BaseException as error:
            for callback in self._callbacks:
                callback.on_exception(error)
            raise
        finally:
            self._keep()
        self._each(lambda callback: callback.on_run_end(self.point))
        return self.point

    def _run(self) -> None:
        self._each(lambda callback: callback.on_run_start(Start(self.plan, self.point, self._path)))
        begins = self.point.round == 0 and not self.stopping
        if begins and self._evaluate is not None and self.plan.evaluate_every:
            self._tell(Round(0, self._evaluation(self._evaluate, self.point)))
        while self.point.round < self.plan.rounds and not self.stopping and not self.point.stopped:
            self._round(self.point.round + 1)

    def _round(self, number: int) -> None:
        began, ask = time.perf_counter(), self.ask(number)
        self._each(lambda callback: callback.on_round_start(number, ask.cohort))
        summed, reports, failures = self._gather(ask)
        trained = time.perf_counter()
        after = self._finish(ask, summed, reports)
        self.committing = True
        self.fleet.settle([report.client for report in reports])
        self.point = after
        self.committing = False
        line = _numbers(ask, reports, failures)
        try:
            self._evaluate_point(ask, line)
        finally:  # the round stands, whatever becomes of its evaluation
            line |= {"train_seconds": trained - began, "seconds": time.perf_counter() - began}
            self._tell(Round(number, line, reports, failures))
        if self.plan.checkpoint_every and number % self.plan.checkpoint_every == 0 and number < self.plan.rounds:
            self._keep()

    def _gather(self, ask: Ask) -> tuple[Contribution, list[Report], list[Failure]]:
        """The sum of what the fleet answers; RoundError if too few do."""
        total, reports, failures = LeafSum(), list[Report](), list[Failure]()
        for part in self.fleet.train(ask):
            total.add(part.position, part.total, len(part.reports) + len(part.failures))
            reports += part.reports
            failures += part.failures
            for failure in part.failures:
                self._report_failure(failure)
            number, answered = ask.context.round, len(reports) + len(failures)
            for callback in self._callbacks:
                callback.on_answers(number, answered, len(ask.cohort))
        summed = total.total()
        needed = updates_needed(self.plan.quorum, ask.goal)
        if summed is None or summed.counted < needed:
            raise _too_few(ask, summed.counted if summed else 0, needed, failures)
        return summed, reports, failures

    def _finish(self, ask: Ask, summed: Contribution, reports: Sequence[Report]) -> Checkpoint:
        """The value after the round, not yet committed."""
        number, before = ask.context.round, self.point
        state = self._strategy.finish(before.state, summed.terms, replace(ask.context, counted=summed.counted))
        _check_finite(vector(state, "parameters"), before, number)
        selector = self._selector.observe(before.selector, {r.client: r.numbers for r in reports})
        carried = carry(before.carried, summed)
        return replace(before, round=number, state=state, carried=carried, selector=selector)

    def ask(self, number: int) -> Ask:
        """What the fleet is asked in that round, after the value there is now: what it was asked already, or anew."""
        plan, begun = self.plan, self.fleet.recall(number)
        cohort, population = (self._select(number), len(self.fleet.population)) if begun is None else begun
        context = Context(number, population, len(cohort))
        return Ask(cohort, plan.cohort, self.point.state, self.point.carried, context, plan.deadline)

    def _select(self, number: int) -> Sequence[str]:
        plan, population = self.plan, self.fleet.population
        asked = min(len(population), math.ceil(plan.cohort * plan.over_select - ROUNDING))
        rng = seeds.stream(plan.seed, "cohort", number)
        reachable = self.fleet.reachable  # too few of them: the others are asked too, and may come back in time
        choice = reachable if len(reachable) >= asked else population
        cohort = self._selector.select(self.point.selector, choice, asked, number, rng)
        if len(set(cohort)) != len(cohort) or not cohort:
            raise RoundError(f"the selector chose {len(cohort)} clients for round {number}, not all different, or none")
        return cohort

    def _evaluate_point(self, ask: Ask, line: dict[str, float]) -> None:
        """What is due after this round, on the model and the client states that the round has made."""
        plan, point, number = self.plan, self.point, ask.context.round
        if self._evaluate is not None and _due(number, plan.evaluate_every, plan.rounds):
            line |= self._evaluation(self._evaluate, point)
        if _due(number, plan.evaluate_clients_every, plan.rounds):
            everyone = self.fleet.reachable
            ask = replace(ask, cohort=everyone, goal=len(everyone), state=point.state, carried=point.carried)
            line |= self._evaluate_clients(ask)

    def _evaluate_clients(self, ask: Ask) -> dict[str, float]:
        """A portion at a time: a population may be too large for a list of its answers."""
        number, spread, answered = ask.context.round, Spread(), 0
        answers = iter(self.fleet.evaluate(ask))
        while portion := list(islice(answers, PORTION)):
            reports = [answer for answer in portion if isinstance(answer, Report)]
            for answer in portion:
                if isinstance(answer, Failure):
                    self._report_failure(answer)
            spread.add(reports)
            answered += len(portion)
            for callback in self._callbacks:
                callback.on_evaluations(number, reports)
                callback.on_answers(number, answered, len(ask.cohort))
        return spread.line()

    @staticmethod
    def _evaluation(evaluate: Evaluate, point: Checkpoint) -> dict[str, float]:
        return {f"test_{name}": value for name, value in evaluate(point.parameters).items() if name != "examples"}

    def _report_failure(self, failure: Failure) -> None:
        self._each(lambda callback: callback.on_failure(failure))

    def _tell(self, round: Round) -> None:
        said = [callback.on_round_end(round, self.point) for callback in self._callbacks]
        stops = [one for one in said if isinstance(one, Stop)]
        if stops:
            self.point = replace(self.point, stopped=stops[0].reason)

    def _keep(self) -> None:
        if self.point.round == self._kept:
            return
        self._kept = self.point.round
        remembered = [callback.remember() for callback in self._remembering]
        self.point = replace(self.point, clients=self.fleet.snapshot(), remembered=remembered)
        self._each(lambda callback: callback.on_checkpoint(self.point))

    def _each(self, call: Callable[[Callback], Any]) -> None:
        for callback in self._callbacks:
            call(callback)


def _due(number: int, every: int, rounds: int) -> bool:
    return bool(every) and (number % every == 0 or number == rounds)


def _too_few(ask: Ask, counted: int, needed: int, failures: Sequence[Failure]) -> RoundError:
    first = f"; first failure: {failures[0].reason}" if failures else ""
    return RoundError(
        f"round {ask.context.round} has {counted} of {len(ask.cohort)} updates and needs {needed}{first}"
        f" (lower quorum to go on without the clients that fail)"
    )


def _check_finite(parameters: Tensor, before: Checkpoint, number: int) -> None:
    finite = torch.isfinite(parameters)
    if not finite.all():
        name = before.layout.locate(Segment.TRAINABLE, int((~finite).nonzero()[0]))
        raise RoundError(
            f"the server's model is not finite after round {number} (tensor {name!r}); "
            f"lower strategy.server_lr or local.lr"
        )


def _numbers(ask: Ask, reports: Sequence[Report], failures: Sequence[Failure]) -> dict[str, float]:
    """The round's line: who took part, means of the clients' metrics weighted by examples, bytes as on a wire."""
    examples = sum(report.numbers["examples"] for report in reports)
    line: dict[str, float] = {
        "asked": len(ask.cohort),
        "counted": len(reports),
        "failed": len(failures),
        "examples": examples,
        "steps": sum(report.numbers["steps"] for report in reports),
        "bytes_down": sum(report.numbers["bytes_down"] for report in reports),
        "bytes_up": sum(report.numbers["bytes_up"] for report in reports),
    }
    means = {name for report in reports for name in report.numbers} - {*line, "lr_sum"}
    for name in sorted(means):
        having = [r for r in reports if name in r.numbers]
        weight = sum(r.numbers["examples"] for r in having)
        if weight > 0:
            line[f"train_{name}"] = sum(r.numbers[name] * r.numbers["examples"] for r in having) / weight
    return line
