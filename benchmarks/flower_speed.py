"""The time of a Flower app's rounds: the same app on flwr's own simulation and on Shoal, in turns.

    python -m benchmarks.flower_speed                    # everything, three times, and whether it is fast enough
    python -m benchmarks.flower_speed --publish          # into benchmarks/results/flower.json and docs/flower.md
    python -m benchmarks.flower_speed --small --force    # see that it works: once, few rounds, on a busy machine

Both have two processes for clients, but where it says that Shoal plays them in its own. The app
(``benchmarks/apps/speed``) looks at the machine's clock at each round's end itself, so both are measured alike: rounds
after the first are the steady state, and the first one is measured from the start of the process. The exit code is 0 if
the results are equal and nothing is slower than it must be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.flower_ways import Done, distance, under_flower, under_shoal
from benchmarks.measure import ROOT
from benchmarks.report import put
from benchmarks.simulation import BUSY, PAUSE, REPETITIONS, circumstances, conditions

__all__ = ["WORKLOADS", "Times", "Workload", "figures", "main", "missed", "table"]

APP, RESULTS, PAGE = Path(__file__).parent / "apps" / "speed", ROOT / "benchmarks" / "results", ROOT / "docs/flower.md"
EQUAL = 1e-9
START, MORE_NODES = 4.0, 1.2  # how many times sooner the first round must be over, and what 10,000 nodes may cost
Line = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """``rounds`` of ``asked`` out of ``nodes`` clients. Shoal must be ``faster`` by this; None: it runs alone.

    ``workers`` are Shoal's.
    """

    title: str
    nodes: int
    asked: int
    rounds: int
    config: Mapping[str, Any] = field(default_factory=dict)
    faster: float | None = None
    workers: int = 2

    @property
    def given(self) -> dict[str, Any]:
        """The app's config."""
        return {"nodes": self.nodes, "asked": self.asked, "rounds": self.rounds, **self.config}


TINY = "a vector of 10, 100 nodes, which train and evaluate"
FEW = "a vector of 10, {:,} registered nodes, 100 asked"  # flwr looks at every node for each of its messages
WORKLOADS: Mapping[str, Workload] = {
    "numpy": Workload(TINY, 100, 100, 12, {"evaluate": True}, 20.0),
    "numpy here": Workload(f"{TINY}; Shoal with `--workers 0`", 100, 100, 12, {"evaluate": True}, 20.0, workers=0),
    "50 MB": Workload("a vector of 50 MB, 20 nodes", 20, 20, 5, {"size": 6_553_600}, 5.0),
    "2nn": Workload("2NN 784-200-200-10, 32 nodes × 60 examples", 32, 32, 8, {"model": "2nn"}, 3.0),
    "1,000": Workload(FEW.format(1_000), 1_000, 100, 30),
    "10,000": Workload(FEW.format(10_000), 10_000, 100, 30),
}


@dataclass(frozen=True)
class Times:
    """Of one run: seconds of each round after the first, and from the process's start to the end of the first."""

    rounds: Sequence[float]
    first: float

    @classmethod
    def of(cls, done: Done) -> Times:
        """From when rounds 0, 1, … were over, by the app's own clock."""
        ends = done.arrays["ends"]
        return cls(np.diff(ends)[1:].tolist(), float(ends[1] - done.began))


def run(work: Workload, repetitions: int) -> tuple[list[Times], list[Times], float | None]:
    """Shoal's times, flwr's, and how far their results are apart; in turns."""
    ways: dict[str, Callable[..., Done]] = {"flwr": under_flower} if work.faster is not None else {}
    ways["shoal"] = partial(under_shoal, workers=work.workers)
    times: dict[str, list[Times]] = {"flwr": [], "shoal": []}
    apart: list[float] = []
    for repetition in range(repetitions):
        found = dict[str, dict[str, np.ndarray]]()
        for way, under in ways.items():
            print(f"  {repetition + 1}/{repetitions} {way}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                done = under(APP, work.nodes, work.given, Path(folder))
            times[way].append(Times.of(done))
            found[way] = {name: array for name, array in done.arrays.items() if name != "ends"}
            time.sleep(PAUSE)
        if "flwr" in found:
            apart.append(distance(found["flwr"], found["shoal"]))
    return times["shoal"], times["flwr"], max(apart, default=None)


def figures(work: Workload, ours: Sequence[Times], theirs: Sequence[Times], apart: float | None) -> Line:
    """Medians over the repetitions; ratios are the medians of those of the repetitions."""
    line: Line = {"title": work.title, "rounds": work.rounds, "faster": work.faster}
    for way, times in (("shoal", ours), ("flwr", theirs)):
        if times:
            line[f"{way}_ms_per_round"] = 1e3 * median(median(run.rounds) for run in times)
            line[f"{way}_first_round_seconds"] = median(run.first for run in times)
            line[f"{way}_ms_of_each_repetition"] = [1e3 * median(run.rounds) for run in times]
    if theirs:
        pairs = list(zip(theirs, ours, strict=True))
        line["times_faster"] = median(median(f.rounds) / median(s.rounds) for f, s in pairs)
        line["times_sooner"] = median(f.first / s.first for f, s in pairs)
        line["apart"] = apart
    return line


def missed(lines: Mapping[str, Line]) -> list[str]:
    """What is not as it must be."""
    found = list[str]()
    for name, line in lines.items():
        if "times_faster" not in line:
            continue
        if not line["apart"] <= EQUAL:
            found.append(f"{name}: results are {line['apart']:.1e} apart")
        if line["times_faster"] < line["faster"]:
            found.append(f"{name}: a round is {line['times_faster']:.1f} times as fast, not {line['faster']:g}")
        if line["times_sooner"] < START:
            found.append(f"{name}: the first round is over {line['times_sooner']:.1f} times as soon, not {START:g}")
    more = more_nodes(lines)
    if more is not None and more > MORE_NODES:
        found.append(f"a round of 10,000 registered nodes takes {more:.2f} times that of 1,000, not {MORE_NODES}")
    return found


def more_nodes(lines: Mapping[str, Line]) -> float | None:
    """What ten times as many registered nodes cost; None where that was not measured."""
    if not {"1,000", "10,000"} <= lines.keys():
        return None
    many, few = (lines[name]["shoal_ms_of_each_repetition"] for name in ("10,000", "1,000"))
    return float(median(a / b for a, b in zip(many, few, strict=True)))


HEAD = ("", "flwr ms/round", "Shoal ms/round", "times faster", "flwr first round s", "Shoal s", "times sooner", "apart")
FORMS = {
    "flwr_ms_per_round": ".0f",
    "shoal_ms_per_round": ".1f",
    "times_faster": ".1f",
    "flwr_first_round_seconds": ".1f",
    "shoal_first_round_seconds": ".1f",
    "times_sooner": ".1f",
    "apart": ".0e",
}


def table(lines: Mapping[str, Line]) -> str:
    """In Markdown."""
    rows = ["| " + " | ".join(HEAD) + " |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    for line in lines.values():
        cells = [f"{line[key]:{form}}" if line.get(key) is not None else "" for key, form in FORMS.items()]
        needed = f" (≥ {line['faster']:g})" if line["faster"] is not None else ""
        cells[2] += needed
        cells[5] += f" (≥ {START:g})" if needed else ""
        rows.append(f"| {line['title']} | " + " | ".join(cells) + " |")
    more = more_nodes(lines)
    note = "" if more is None else f"\n\nA round of 10,000 registered nodes takes {more:.2f} times that of 1,000."
    return "\n".join(rows) + note


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--small", action="store_true", help="see that it works: once, few rounds")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--out", type=Path, default=RESULTS / "latest-flower.json")
    parser.add_argument("--publish", action="store_true", help="into benchmarks/results/flower.json and the docs")
    return parser.parse_args()


def main() -> int:
    asked = options()
    here = circumstances("benchmarks.flower_speed")
    if (here["load_average"] or 0) > BUSY and not asked.force:
        print(f"the load average is {here['load_average']:.1f}: other work would distort the times; wait, or --force")
        return 2
    lines = dict[str, Line]()
    for name in asked.only:
        work = replace(WORKLOADS[name], rounds=3) if asked.small else WORKLOADS[name]
        print(f"{name}: {work.title}", file=sys.stderr, flush=True)
        lines[name] = figures(work, *run(work, 1 if asked.small else asked.repetitions))
    out = RESULTS / "flower.json" if asked.publish else asked.out
    out.write_text(json.dumps({"circumstances": here, "lines": lines}, indent=2) + "\n")
    print(table(lines))
    if asked.publish:
        text = f"{conditions(here)}\n\n{table(lines)}"
        PAGE.write_text(put(PAGE.read_text("utf-8"), "speed", text, "benchmarks/flower_speed.py"), "utf-8")
    problems = missed(lines)
    print("\n".join(problems) or "as fast as it must be", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
