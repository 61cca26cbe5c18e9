"""The time of a round: Shoal's engines beside a loop written by hand, the bare kernels, and other frameworks.

    make bench            # Shoal's engines, the plain loop, the kernel floor, flwr: every workload
    make bench-peers      # beside pfl, BlazeFL and FedJAX, each in an environment of its own

    python -m benchmarks.simulation --only lr-tiny --contenders 'shoal-*-1' floor

All contenders begin with the same weights, ask the same clients in the same rounds, give a client its examples in the
same order and evaluate nothing; so all must end at the plain loop's weights, else the benchmark fails. Processes
compute with one thread each. docs/performance.md says what is measured how, and holds the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, Answer, Failed, measure
from benchmarks.peers import environments
from benchmarks.report import figures, put, table, wrong
from benchmarks.roster import CONTENDERS, ENVIRONMENT, chosen
from benchmarks.tasks import Task
from benchmarks.workloads import DEFAULT, WORKLOADS, Workload, prepared

__all__ = ["circumstances", "conditions", "main"]

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
REPETITIONS, PAUSE = 3, 2.0  # seconds, for what a contender leaves in caches and queues
QUICK = {"rounds": 6, "cohort": 16, "short": 4}
BUSY = 1.0
STANDARD = ["floor", "shoal-*-1", "shoal-lean-2", "shoal-auto-2", "flwr"]


def circumstances(program: str = "benchmarks.simulation") -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    commit = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True)
    return {
        "machine": {"processor": (models or [platform.processor()])[0], "cores": os.cpu_count()},
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "commit": done.stdout.strip()} | _versions(),
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _versions() -> dict[str, str]:
    found = dict[str, str]()
    for name in ("torch", "numpy", "flwr", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(task: Task, names: list[str], repetitions: int) -> dict[str, list[Answer] | str]:
    """Every contender's repetitions, in turns; the reason for one that fails, which is not tried again."""
    runs: dict[str, list[Answer] | str] = {name: list[Answer]() for name in names}
    for repetition in range(repetitions):
        for name in names:
            made = runs[name]
            if isinstance(made, str):
                continue
            print(f"  {repetition + 1}/{repetitions} {name}", file=sys.stderr, flush=True)
            try:
                if name in ENVIRONMENT and (why := environments.why_not(ENVIRONMENT[name])):
                    raise Failed(why)
                made.append(measure(CONTENDERS[name], task))
            except Failed as error:
                runs[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr)
            time.sleep(PAUSE if repetitions > 1 else 0)
    return runs


def references(task: Task, runs: Mapping[str, list[Answer] | str]) -> dict[int, np.ndarray]:
    """The plain loop's weights at the end, and after the rounds that slow contenders do."""
    plain, found = runs["plain"], dict[int, np.ndarray]()
    if isinstance(plain, str):
        return found
    slow = any(CONTENDERS[name].slow for name in runs) and task.short.rounds < task.rounds
    sooner = [(task.short, measure(CONTENDERS["plain"], task.short))] if slow else []
    for of, answer in [(task, plain[0]), *sooner]:
        if answer.weights is not None:
            found[of.rounds] = answer.weights
    return found


def heading(work: Workload, task: Task) -> dict[str, Any]:
    sizes = sorted(task.size(client) for client in range(task.shards))
    return {
        "title": work.title,
        "rounds": work.rounds,
        "cohort": work.cohort,
        "batch": work.batch,
        "parameters": len(task.initial),
        "examples_of_a_client": {"least": sizes[0], "median": sizes[len(sizes) // 2], "most": sizes[-1]},
    }


def page(report: Mapping[str, Any]) -> str:
    """What stands in docs/performance.md: first what was run on what, where that is not as above."""
    parts, above = list[str](), None
    for name, found in report.items():
        if (here := conditions(found["circumstances"])) != above:
            parts.append(here)
        above = here
        floor = found["lines"].get("floor", {})
        peak = (
            f" Peak {floor['peak_gflops']:.0f} GF/s, copies {floor['copy_gbytes']:.1f} GB/s; floor: {floor['layout']}."
            if "layout" in floor
            else ""
        )
        about = f"{found['title']}, {found['cohort']} a round, {found['parameters']:,} parameters"
        parts.append(f"**{name}** · {about}, {found['rounds']} rounds.{peak}\n\n{table(found['lines'])}")
    return "\n\n".join(parts)


def conditions(found: Mapping[str, Any]) -> str:
    """What was run on what, for people."""
    machine, load = found["machine"], found["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"`{found['command']}` on {machine['processor']}, {machine['cores']} cores, {found['system']}; {versions}; "
        f"load average before: {'unknown' if load is None else f'{load:.2f}'}."
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=DEFAULT, metavar="WORKLOAD")
    parser.add_argument("--contenders", nargs="+", default=STANDARD, help="patterns; plain is in")
    parser.add_argument("--without", nargs="+", default=[], help="patterns")
    parser.add_argument("--list", action="store_true", help="list workloads and contenders")
    parser.add_argument("--rounds", type=int, help="in place of the workload's own, at least 3")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--quick", action="store_true", help="see that it works: once, few rounds of few clients")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--out", type=Path, default=RESULTS / "latest.json")
    parser.add_argument("--publish", choices=["simulation", "peers"], help="into that results file and the docs")
    return parser.parse_args()


def main() -> int:
    asked = options()
    if asked.list:
        print("workloads: ", *WORKLOADS, "\ncontenders:", *CONTENDERS)
        return 0
    here = circumstances()
    if (here["load_average"] or 0) > BUSY and not asked.force:
        print(f"the load average is {here['load_average']:.1f}: other work would distort the times; wait, or --force")
        return 2
    out = RESULTS / f"{asked.publish}.json" if asked.publish else asked.out
    out.parent.mkdir(parents=True, exist_ok=True)
    published = asked.publish and out.exists()
    report: dict[str, Any] = json.loads(out.read_text("utf-8")) if published else {}  # other workloads stay
    failures = dict[str, str]()
    for name in asked.only:
        work = replace(WORKLOADS[name], rounds=asked.rounds or WORKLOADS[name].rounds)
        work = (
            replace(work, **{key: min(most, getattr(work, key)) for key, most in QUICK.items()})
            if asked.quick
            else work
        )
        print(f"\n{name}: {work.title}", flush=True)
        with prepared(work) as task:
            names = chosen(asked.contenders, [*asked.without, *work.without])
            runs = run(task, names, 1 if asked.quick else asked.repetitions)
            lines = figures(task, runs, CONTENDERS, references(task, runs))
            report[name] = {"circumstances": here} | heading(work, task) | {"lines": lines}
        failures |= {f"{name}, {contender}": why for contender, why in wrong(work, lines, CONTENDERS).items()}
        print(table(lines), flush=True)
        report = {known: report[known] for known in WORKLOADS if known in report}
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")  # what is measured is not lost
    if asked.publish:
        PAGE.write_text(put(PAGE.read_text("utf-8"), asked.publish, page(report)), "utf-8")
    for where, why in failures.items():
        print(f"FAILED {where}: {why}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
