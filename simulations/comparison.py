"""The statistics of a comparison: what the runs of its cells say together, one row an arm.

An arm is a strategy; a cell is one arm under one seed. The cells of a seed have shards, initial weights, cohorts and
batches in common, so differences between arms are taken seed by seed. ``±`` is the sample standard deviation over
seeds (n − 1), never a confidence interval. Nothing here reads a file: a run comes as its ``summary.json`` or its
``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

__all__ = [
    "Point",
    "Row",
    "Spread",
    "curve",
    "headings",
    "main_metric",
    "on_significance",
    "plus_minus",
    "rows",
    "texts",
]

Summary = Mapping[str, Any]  # a run's summary.json
Line = Mapping[str, Any]  # a line of its metrics.jsonl
ENOUGH = 6  # seeds: the fewest with which a two-sided paired sign test can give p < 0.05


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; None where there are too few values."""

    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values) if values else None, stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """One arm: its values of ``metric`` over the seeds whose run finished. The fields are the columns of ``table.csv``.

    ``best`` is the mean of each run's best evaluation. Differences are to the first arm, over the ``pairs`` seeds that
    both finished. Of rounds and megabytes (both ways) to the target the mean is over the ``reached`` seeds only: it is
    a lower bound where others have not reached it.
    """

    strategy: str
    metric: str
    seeds: int
    finished: int
    mean: float | None
    sd: float | None
    mean_of_last_10: float | None
    sd_of_last_10: float | None
    best: float | None
    difference: float | None
    difference_sd: float | None
    difference_of_last_10: float | None
    difference_of_last_10_sd: float | None
    pairs: int
    target: float | None
    reached: int
    rounds_to_target: float | None
    rounds_to_target_sd: float | None
    megabytes_to_target: float | None
    megabytes: float | None
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


def rows(
    arms: Sequence[str],
    seeds: Sequence[int],
    finished: Mapping[tuple[str, int], Summary],
    metric: str,
    target: Mapping[str, float],
) -> list[Row]:
    """A row an arm, in order; ``finished`` holds the cells that there are."""
    return [_row(arm, arms[0], seeds, finished, metric, target) for arm in arms]


def _row(
    arm: str,
    first: str,
    seeds: Sequence[int],
    finished: Mapping[tuple[str, int], Summary],
    metric: str,
    target: Mapping[str, float],
) -> Row:
    runs = [finished[arm, seed] for seed in seeds if (arm, seed) in finished]
    last, ten = (Spread.of(_values(runs, kind, metric)) for kind in ("last", "mean_of_last_10"))
    pairs = [(finished[arm, s], finished[first, s]) for s in seeds if {(arm, s), (first, s)} <= finished.keys()]
    pairs = [] if arm == first else pairs
    difference, of_ten = (Spread.of(_differences(pairs, kind, metric)) for kind in ("last", "mean_of_last_10"))
    name = next(iter(target), None)
    reached = [run["target"][name] for run in runs if name and run["target"][name]["round"] is not None]
    until = Spread.of([there["round"] for there in reached])
    return Row(
        strategy=arm,
        metric=metric,
        seeds=len(seeds),
        finished=len(runs),
        mean=last.mean,
        sd=last.sd,
        mean_of_last_10=ten.mean,
        sd_of_last_10=ten.sd,
        best=Spread.of([run["best"][metric]["value"] for run in runs if metric in run["best"]]).mean,
        difference=difference.mean,
        difference_sd=difference.sd,
        difference_of_last_10=of_ten.mean,
        difference_of_last_10_sd=of_ten.sd,
        pairs=len(pairs),
        target=target[name] if name else None,
        reached=len(reached),
        rounds_to_target=until.mean,
        rounds_to_target_sd=until.sd,
        megabytes_to_target=Spread.of([_megabytes(there) for there in reached]).mean,
        megabytes=Spread.of([_megabytes(run) for run in runs]).mean,
        client_failures=sum(run["failed"] for run in runs),
    )


def _values(runs: Sequence[Summary], kind: str, metric: str) -> list[float]:
    return [run[kind][metric] for run in runs if metric in run[kind]]


def _differences(pairs: Sequence[tuple[Summary, Summary]], kind: str, metric: str) -> list[float]:
    """This arm's value minus the first arm's, seed by seed."""
    return [a[kind][metric] - b[kind][metric] for a, b in pairs if metric in a[kind] and metric in b[kind]]


def _megabytes(spent: Mapping[str, float]) -> float:
    return (spent["bytes_up"] + spent["bytes_down"]) / 1e6


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


# --- in words --------------------------------------------------------------------------------------------------------


def headings(metric: str, target: Mapping[str, float]) -> list[str]:
    """The columns of the short table."""
    named = ["strategy", metric.removeprefix("test_").replace("_", " "), "difference"]
    return named + [f"{what} to {value:g}" for value in list(target.values())[:1] for what in ("rounds", "MB")]


def texts(row: Row) -> list[str]:
    """A row of the short table; what is missing is said."""
    missing = "" if row.finished == row.seeds else f" ({row.finished}/{row.seeds} seeds)"
    value, difference = plus_minus(row.mean, row.sd), plus_minus(row.difference, row.difference_sd, "+.4f")
    cells = [row.strategy, value + missing, difference]
    if row.target is None:
        return cells
    least = "" if row.reached == row.finished else "≥ "
    rounds, megabytes = (
        "–" if value is None else f"{least}{value:.1f}" for value in (row.rounds_to_target, row.megabytes_to_target)
    )
    return [*cells, f"{rounds} ({row.reached}/{row.finished})", megabytes]


def plus_minus(mean: float | None, sd: float | None, form: str = ".4f") -> str:
    """``0.7500 ± 0.0123``; without ± for a single value, a dash for none."""
    if mean is None:
        return "–"
    return f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:.4f}"


def on_significance(seeds: int) -> str:
    """What may be concluded from so many seeds; this version tests nothing."""
    number = "1 seed" if seeds == 1 else f"{seeds} seeds"
    least = f"the smallest two-sided p of a paired sign test with {number} is 2/2^{seeds} = {2 / 2**seeds:.2g}"
    if seeds < ENOUGH:
        return f"Too few seeds for a significance test ({least}); none is made."
    return f"This version makes no significance test ({least})."
