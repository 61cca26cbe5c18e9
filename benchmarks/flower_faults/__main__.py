"""The faults of ``make chaos``, done to a deployment of Flower, and what became of its run.

    python -m benchmarks.flower_faults --trials 5 [--only SuperNode] [--seed 1] [--publish]

A trial is one run of ``app/pulled.py`` on a SuperLink and two SuperNodes. In its second round one fault strikes. Who
dies is started again with the same command at once. If the run fails or hangs all the same, its operator submits it
again, from the last round that the app itself has kept. At the end every round's model is compared with a closed form.
Outcomes are kept in the folder: what was interrupted goes on, and ``--publish`` counts all that are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.flower_faults.faults import FAULTS, Fault
from benchmarks.flower_faults.stage import NODES, ROUNDS, Stage
from tests.chaos import page

RESULTS = Path(__file__).parents[1] / "results" / "flower-faults.json"
LOG = "outcomes.jsonl"  # of the folder: a line a trial
MOST = 3  # times that a run is submitted


@dataclass
class Outcome:
    """One trial. ``ends`` is how the run that was disturbed ended, ``restarts`` who ended without being killed."""

    fault: str
    seed: int
    ends: str = ""
    submitted: int = 0
    restarts: int = 0
    finished: bool = False
    equal: bool = False
    seconds: float = 0.0
    problem: str = ""


async def play(fault: Fault, seed: int, folder: Path) -> Outcome:
    outcome, began = Outcome(fault.name, seed), time.monotonic()
    stage = Stage(folder, random.Random(f"{fault.name} {seed}"), fault.apart)
    try:
        await stage.open()
        await stage.submit()
        outcome.submitted = 1
        await stage.until("round", 2)  # of the model at the beginning, and of the first round
        await fault.strike(stage)
        outcome.ends = ends = await stage.ended()
        while ends != "finished:completed" and outcome.submitted < MOST:
            if ends == "hung":
                await stage.stop()
            await stage.submit()
            outcome.submitted += 1
            ends = await stage.ended()
        outcome.finished, outcome.equal = ends == "finished:completed", stage.equal()
    except Exception:  # of the harness: a trial to look at, not a lost campaign
        outcome.problem = traceback.format_exc()
    finally:
        await stage.close()
    outcome.restarts, outcome.seconds = stage.restarts, round(time.monotonic() - began, 1)
    return outcome


async def campaign(faults: Sequence[Fault], seeds: Sequence[int], jobs: int, out: Path) -> None:
    """The trials that are not in the folder's log yet, several side by side."""
    known = {(outcome.fault, outcome.seed) for outcome in logged(out) if not outcome.problem}
    left = iter([(fault, seed) for seed in seeds for fault in faults if (fault.name, seed) not in known])

    async def worker() -> None:
        for fault, seed in left:
            folder = Path(tempfile.mkdtemp(prefix=f"{seed}-", dir=out))
            outcome = await play(fault, seed, folder)
            with (out / LOG).open("a") as log:
                log.write(json.dumps(asdict(outcome)) + "\n")
            print(
                f"{outcome.fault}, seed {seed}: {outcome.ends or outcome.problem}, equal: {outcome.equal}", flush=True
            )
            if outcome.finished and outcome.equal:
                shutil.rmtree(folder)

    async with asyncio.TaskGroup() as group:
        for _ in range(jobs):
            group.create_task(worker())


def logged(out: Path) -> list[Outcome]:
    lines = (out / LOG).read_text().splitlines() if (out / LOG).exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def counted(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A row for each fault, in the order of ``FAULTS``; trials in which the harness itself failed are not counted."""
    rows = []
    for fault in FAULTS:
        tried = [o for o in outcomes if o.fault == fault.name and not o.problem]
        alone = [o for o in tried if o.ends == "finished:completed"]
        if tried:
            rows.append(
                {
                    "fault": fault.name,
                    "trials": len(tried),
                    "went_on": len(alone),
                    "went_on_equal": sum(o.equal for o in alone),
                    "submitted_again": len(tried) - len(alone),
                    "submitted_again_equal": sum(o.equal and o.finished for o in tried if o not in alone),
                }
            )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, loaded",
        "flwr": version("flwr"),
        "nodes": NODES,
        "rounds": ROUNDS,
        "rows": rows,
        "trials": [asdict(o) for o in sorted(outcomes, key=lambda o: (o.seed, o.fault))],
    }


def rendered(results: dict[str, Any]) -> str:
    lines = [
        f"flwr {results['flwr']}, {results['nodes']} SuperNodes, {results['rounds']} rounds ({results['machine']}).",
        "",
        "| fault, in the second round | trials | the run went on | with the undisturbed model "
        "| had to be submitted again | then with the undisturbed model |",
        "|---|---|---|---|---|---|",
    ]
    columns = ("fault", "trials", "went_on", "went_on_equal", "submitted_again", "submitted_again_equal")
    for row in results["rows"]:
        again = row["submitted_again"]
        numbers = [str(row[name]) for name in columns[:-1]] + [str(row[columns[-1]]) if again else "–"]
        numbers[3] = numbers[3] if row["went_on"] else "–"
        lines.append(f"| {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=5, help="of each fault")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the others follow")
    parser.add_argument("--only", default="", help="faults that this regular expression finds")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "shoal-flower-faults")
    parser.add_argument("--publish", action="store_true", help="write the results and the table of the docs")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however it ends, its processes end with it
    out = given.folder.resolve()
    out.mkdir(parents=True, exist_ok=True)
    faults = [fault for fault in FAULTS if re.search(given.only, fault.name)]
    asyncio.run(campaign(faults, range(given.seed, given.seed + given.trials), given.jobs, out))
    results = counted(logged(out))
    print(table := rendered(results))
    if given.publish:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        page.write("make chaos-flower", table)
    return 1 if any(trial["problem"] for trial in results["trials"]) else 0


if __name__ == "__main__":
    sys.exit(main())
