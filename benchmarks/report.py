"""From runs to figures, and from figures to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.measure import Answer, Contender
from benchmarks.tasks import Task
from benchmarks.workloads import Workload

__all__ = ["NORM", "figures", "put", "table", "wrong"]

NORM = 1e-3  # how far weights may lie from the plain loop's, as a part of their norm
Runs = Mapping[str, Sequence[Answer] | str]
Line = dict[str, Any]
References = Mapping[int, np.ndarray]


def figures(task: Task, runs: Runs, cast: Mapping[str, Contender], references: References) -> dict[str, Line]:
    """A line for each contender; one that gave no answer has the reason instead of answers, and keeps it.

    ``references`` are the plain loop's weights after so many rounds.
    """
    return {name: _line(name, cast[name].task(task), runs, cast, references) for name in runs}


def _amount(task: Task) -> tuple[float, float]:
    """Steps and examples of a round; the first round is left out, as in the times."""
    sizes = [[task.size(client) for client in cohort] for cohort in task.cohorts[1:]]
    steps = mean(sum(-(-size // task.batch) for size in cohort) for cohort in sizes)
    return steps, mean(sum(cohort) for cohort in sizes)


def _line(name: str, task: Task, runs: Runs, cast: Mapping[str, Contender], references: References) -> Line:
    made, cores, (steps, examples) = runs[name], cast[name].cores, _amount(task)
    if isinstance(made, str):
        return {"failed": made}
    seconds, memory = _median(made), [run.memory for run in made if run.memory is not None]
    first = [run.first for run in made if run.first is not None]
    return {
        "cores": cores,
        "rounds": task.rounds,
        "ms_per_round": 1e3 * seconds,
        "core_us_per_step": 1e6 * seconds * cores / steps,
        "plain_over_this": _ratio(runs, "plain", name),
        "this_over_shoal": _over_shoal(name, runs, cast),
        "part_of_floor": _part(_ratio(runs, "floor", name), cores),
        **_roofline(runs, seconds * cores, examples),
        "first_round_seconds": median(first) if first else None,
        "peak_megabytes": max(memory) / 1e6 if memory and name != "floor" else None,
        **_differences(task, made, references),
        "ms_of_each_repetition": [1e3 * median(run.seconds) for run in made],
        **{key: value for key, value in made[0].more.items() if isinstance(value, str)},
    }


def _median(made: Sequence[Answer]) -> float:
    return median(median(run.seconds) for run in made)


def _part(ratio: float | None, cores: int) -> float | None:
    return None if ratio is None else ratio / cores


def _ratio(runs: Runs, above: str, below: str) -> float | None:
    """The median of what each repetition says of two contenders; None where one has no answer."""
    one, other = runs.get(above, ""), runs.get(below, "")
    if isinstance(one, str) or isinstance(other, str):
        return None
    return median(median(a.seconds) / median(b.seconds) for a, b in zip(one, other, strict=True))


def _over_shoal(name: str, runs: Runs, cast: Mapping[str, Contender]) -> float | None:
    """Beside the fastest of Shoal's engines on as many cores."""
    alike = [other for other in runs if other.startswith("shoal") and cast[other].cores == cast[name].cores]
    engines = {other: made for other in alike if not isinstance(made := runs[other], str)}
    return _ratio(runs, name, min(engines, key=lambda other: _median(engines[other]))) if engines else None


def _roofline(runs: Runs, core_seconds: float, examples: float) -> Line:
    """What the machine could do at best: the slower of computing at its peak and reading the examples once."""
    floor = runs.get("floor", "")
    if isinstance(floor, str):
        return {"part_of_roofline": None}
    flop, read = (float(floor[0].more[key]) * examples for key in ("flop_of_an_example", "bytes_of_an_example"))
    peak, copied = (median(float(run.more[key]) for run in floor) for key in ("peak_gflops", "copy_gbytes"))
    least = max(flop / (1e9 * peak), read / (1e9 * copied))
    machine = {"peak_gflops": peak, "copy_gbytes": copied}
    return {"part_of_roofline": least / core_seconds, "core_gflops": flop / core_seconds / 1e9, **machine}


def _differences(task: Task, made: Sequence[Answer], references: References) -> Line:
    """How far from the plain loop's weights: as a part of their norm, and of the way that the plain loop went."""
    theirs, norm = references.get(task.rounds), np.linalg.norm
    if theirs is None or made[0].weights is None:
        return {}
    far = max(float(norm(run.weights - theirs)) for run in made if run.weights is not None)
    return {"difference": far / float(norm(theirs)), "of_the_way": far / float(norm(theirs - task.initial))}


def wrong(work: Workload, lines: Mapping[str, Line], cast: Mapping[str, Contender]) -> dict[str, str]:
    """What makes the benchmark fail, by contender."""
    found = {name: line["failed"] for name, line in lines.items() if "failed" in line and cast[name].ours}
    found = {name: why for name, why in found.items() if not why.startswith("refused")}
    for name, line in lines.items():
        if work.compared and "difference" in line:
            far, part = line["difference"], line["of_the_way"]
            if not (far <= NORM and part <= work.tolerance):
                found[name] = f"not the plain loop's weights: {far:.1e} of their norm, {part:.1e} of the way"
    return found


HEAD = (
    *("", "cores", "ms/round", "core-µs/step", "plain ÷ this", "this ÷ Shoal", "% of floor", "% of roofline"),
    *("first round s", "peak MB", "difference"),
)


def table(lines: Mapping[str, Line]) -> str:
    """In Markdown."""
    rows = ["| " + " | ".join(HEAD) + " |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    for name, line in lines.items():
        engine = f" ({line['engine']})" if "engine" in line else ""
        rows.append(
            f"| {name}{engine} | " + (f"{line['failed']} |" if "failed" in line else " | ".join(_cells(line)) + " |")
        )
    return "\n".join(rows)


def _cells(line: Line) -> list[str]:
    return [
        str(line["cores"]),
        f"{line['ms_per_round']:.1f}",
        f"{line['core_us_per_step']:.1f}",
        _shown(line["plain_over_this"]),
        _shown(line["this_over_shoal"]),
        _shown(line["part_of_floor"], ".0%"),
        _shown(line["part_of_roofline"], ".0%"),
        _shown(line["first_round_seconds"], ".1f"),
        _shown(line["peak_megabytes"], ".0f"),
        _shown(line.get("of_the_way"), ".0e"),
    ]


def _shown(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def put(page: str, name: str, text: str, by: str = "benchmarks/simulation.py") -> str:
    """The page with ``text`` between the markers of that name."""
    begin, end = f"<!-- {name}: written by {by} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no place for {name!r}, between {begin.strip()!r} and {end!r}")
    return f"{before}{begin}\n{text}\n\n{end}{after}"
