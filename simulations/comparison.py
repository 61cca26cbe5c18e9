"""What the runs of a comparison say together, one row for each scenario and arm.

An arm is a strategy; a scenario is one choice of what is varied besides (empty if nothing is); a cell is one arm in
one scenario under one seed. The cells of a scenario and seed have shards, initial weights, cohorts and batches in
common, so differences between arms are taken seed by seed. Nothing here reads a file: a run comes as its summary, as
:func:`shoal.run.summarise` makes it, or as the lines of its ``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import itemgetter
from statistics import fmean
from typing import Any

from shoal.simulations.statistics import Interval, Times, holm, mean, seeds_needed, sign_flip

__all__ = ["Point", "Row", "curve", "main_metric", "rows"]

Summary = Mapping[str, Any]
Line = Mapping[str, Any]
Finished = Mapping[tuple[str, str, int], Summary]  # by scenario, arm and seed: the cells that there are


@dataclass(frozen=True)
class Row:
    """One arm in one scenario, over the seeds whose run finished. The fields are the columns of ``table.csv``.

    ``mean`` is of the last evaluation of ``metric``; ``low`` and ``high`` bound its 95 % confidence interval, ``sd`` is
    the sample standard deviation over seeds. ``best`` is the mean of each run's best evaluation. Differences are to the
    scenario's first arm, over the ``pairs`` seeds that both finished. ``p`` is that of a two-sided sign-flip test of
    ``difference``, ``p_holm`` the same after Holm's correction over all ``comparisons`` of the table; both are None
    where there are fewer than ``seeds_needed`` pairs. What it took to the target is a restricted mean (runs that missed
    it count with all they spent: a lower bound) and a median, None unless more than half the runs reached it. Megabytes
    go both ways. ``clients_…`` is over clients, each on its own held-out examples, averaged over seeds.
    """

    scenario: str
    strategy: str
    metric: str
    seeds: int
    finished: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    mean_of_last_10: float | None
    sd_of_last_10: float | None
    low_of_last_10: float | None
    high_of_last_10: float | None
    best: float | None
    best_sd: float | None
    pairs: int
    difference: float | None
    difference_sd: float | None
    difference_low: float | None
    difference_high: float | None
    difference_of_last_10: float | None
    difference_of_last_10_low: float | None
    difference_of_last_10_high: float | None
    p: float | None
    p_holm: float | None
    comparisons: int
    seeds_needed: int
    target: float | None
    reached: int
    rounds_to_target: float | None
    rounds_to_target_low: float | None
    rounds_to_target_high: float | None
    rounds_to_target_median: float | None
    megabytes_to_target: float | None
    megabytes_to_target_median: float | None
    seconds_to_target: float | None
    seconds_to_target_median: float | None
    megabytes: float | None
    seconds: float | None
    clients_mean: float | None
    clients_weighted: float | None
    clients_variance: float | None
    clients_worst_10: float | None
    clients_worst_10_low: float | None
    clients_worst_10_high: float | None
    clients_best_10: float | None
    client_failures: int


@dataclass(frozen=True)
class Point:
    """A metric in one round over an arm's seeds, with the megabytes sent until then, both ways (mean)."""

    round: int
    megabytes: float
    mean: float
    low: float
    high: float


def main_metric(summaries: Iterable[Summary], target: Mapping[str, float]) -> str:
    """The target's metric; else the first on the test set that is no loss; else the loss."""
    if target:
        return f"test_{next(iter(target))}"
    names = dict.fromkeys(name for summary in summaries for name in summary.get("last", {}))
    return next((name for name in names if name.startswith("test_") and name != "test_loss"), "test_loss")


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(
    scenarios: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    finished: Finished,
    metric: str,
    target: Mapping[str, float],
) -> list[Row]:
    """A row for each scenario and arm, in order; the tests of all of them are one family."""
    comparisons = len(scenarios) * (len(arms) - 1)
    frame = _Frame(seeds, finished, metric, next(iter(target.items()), None), comparisons)
    return _tested([frame.row(scenario, arm, arms[0]) for scenario in scenarios for arm in arms])


def _tested(untested: Sequence[Row]) -> list[Row]:
    """With Holm's correction: a comparison that could not be tested counts as one that found nothing."""
    table, ps = list(untested), {i: row.p for i, row in enumerate(untested) if row.p is not None}
    missing = [1.0] * (table[0].comparisons - len(ps)) if table else []
    for place, p in zip(ps, holm([*ps.values(), *missing]), strict=False):
        table[place] = replace(table[place], p_holm=p)
    return table


@dataclass(frozen=True)
class _Frame:
    """What all rows of a table have in common."""

    seeds: Sequence[int]
    finished: Finished
    metric: str
    target: tuple[str, float] | None
    comparisons: int

    def row(self, scenario: str, arm: str, first: str) -> Row:
        runs = [self.finished[scenario, arm, s] for s in self.seeds if (scenario, arm, s) in self.finished]
        last, ten = (Interval.of(self._values(runs, kind)) for kind in ("last", "mean_of_last_10"))
        best = Interval.of([run["best"][self.metric]["value"] for run in runs if self.metric in run["best"]])
        return Row(
            scenario=scenario,
            strategy=arm,
            metric=self.metric,
            seeds=len(self.seeds),
            finished=len(runs),
            **_named(last, "mean", "sd", "low", "high"),
            **_named(ten, *(f"{name}_of_last_10" for name in ("mean", "sd", "low", "high"))),
            best=best.mean,
            best_sd=best.sd,
            **self._differences(scenario, arm, first),
            comparisons=self.comparisons,
            seeds_needed=seeds_needed(self.comparisons) if self.comparisons else 1,
            **self._until(scenario, runs),
            megabytes=mean([_megabytes(run) for run in runs]),
            seconds=mean([run["seconds"] for run in runs]),
            **self._clients(runs),
            client_failures=sum(run["failed"] for run in runs),
        )

    def _values(self, runs: Sequence[Summary], kind: str) -> list[float]:
        return [run[kind][self.metric] for run in runs if self.metric in run[kind]]

    def _differences(self, scenario: str, arm: str, first: str) -> dict[str, Any]:
        """This arm's value minus the first arm's, seed by seed, and the test where there are seeds enough for one."""
        keys = [((scenario, arm, s), (scenario, first, s)) for s in self.seeds]
        pairs = [(self.finished[a], self.finished[b]) for a, b in keys if {a, b} <= self.finished.keys() and a != b]
        last, ten = (
            [a[k][self.metric] - b[k][self.metric] for a, b in pairs if self.metric in a[k] and self.metric in b[k]]
            for k in ("last", "mean_of_last_10")
        )
        enough = self.comparisons and len(last) >= seeds_needed(self.comparisons)
        of_ten, name = Interval.of(ten), "difference_of_last_10"
        return {
            "pairs": len(last),
            **_named(Interval.of(last), "difference", *(f"difference_{what}" for what in ("sd", "low", "high"))),
            **{name: of_ten.mean, f"{name}_low": of_ten.low, f"{name}_high": of_ten.high},
            "p": sign_flip(last) if enough else None,
            "p_holm": None,
        }

    def _until(self, scenario: str, runs: Sequence[Summary]) -> dict[str, Any]:
        """What it took to the target. A run that missed it counts with all rounds, also where it was stopped early.

        Those are the scenario's: rounds may be what is varied.
        """
        name, value = self.target or ("", None)
        most = max((run["rounds"] for (where, _, _), run in self.finished.items() if where == scenario), default=0)
        there = [run["target"][name] for run in runs] if name else []
        in_all = [{**run, "round": most} for run in runs] if name else []
        rounds, megabytes, seconds = (
            Times.of([None if at["round"] is None else of(at) for at in there], [of(run) for run in in_all])
            for of in (itemgetter("round"), _megabytes, itemgetter("seconds"))
        )
        return {
            "target": value,
            "reached": rounds.reached,
            "rounds_to_target": rounds.restricted.mean,
            "rounds_to_target_low": rounds.restricted.low,
            "rounds_to_target_high": rounds.restricted.high,
            "rounds_to_target_median": rounds.median,
            "megabytes_to_target": megabytes.restricted.mean,
            "megabytes_to_target_median": megabytes.median,
            "seconds_to_target": seconds.restricted.mean,
            "seconds_to_target_median": seconds.median,
        }

    def _clients(self, runs: Sequence[Summary]) -> dict[str, Any]:
        name = self.metric.removeprefix("test_")
        found = [run["fairness"][name] for run in runs if name in run.get("fairness", {})]
        worst = Interval.of([one["worst_10"] for one in found])
        return {
            **{f"clients_{what}": mean([one[what] for one in found]) for what in ("mean", "variance", "best_10")},
            "clients_weighted": mean([one["weighted"] for one in found if one["weighted"] is not None]),
            "clients_worst_10": worst.mean,
            "clients_worst_10_low": worst.low,
            "clients_worst_10_high": worst.high,
        }


def _named(found: Interval, mean: str, sd: str, low: str, high: str) -> dict[str, Any]:
    return {mean: found.mean, sd: found.sd, low: found.low, high: found.high}


def _megabytes(spent: Mapping[str, float]) -> float:
    return (spent["bytes_up"] + spent["bytes_down"]) / 1e6


# --- curves ----------------------------------------------------------------------------------------------------------


def curve(runs: Sequence[Sequence[Line]], name: str) -> list[Point]:
    """A metric round by round over the runs of one arm, where all of them have it."""
    if not runs:
        return []
    values = [{line["round"]: line[name] for line in run if line.get(name) is not None} for run in runs]
    sent = [_sent(run) for run in runs]
    points = []
    for round in sorted(set.intersection(*(set(one) for one in values))):
        now = [one[round] for one in values]
        points.append(Point(round, fmean(one[round] for one in sent), fmean(now), min(now), max(now)))
    return points


def _sent(run: Sequence[Line]) -> dict[int, float]:
    """Megabytes until the end of each round."""
    each = [(line.get("bytes_up", 0) + line.get("bytes_down", 0)) / 1e6 for line in run]
    return dict(zip((line["round"] for line in run), accumulate(each), strict=True))
