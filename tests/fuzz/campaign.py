"""Fuzz the decoders and the calls for a while, guided by coverage (atheris), and publish what came of it.

    python -m tests.fuzz.campaign --minutes 30 --publish

Half of the time goes to each target. An input that breaks one is kept in tests/fuzz/broken/, which the suite runs too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__: list[str] = []

TARGETS = {"decoders": "every decoder", "calls": "every call of the service, on a real server"}
ROOT = Path(__file__).parents[2]
BROKEN, RESULTS, PAGE = ROOT / "tests" / "fuzz" / "broken", "benchmarks/results/fuzz.json", ROOT / "docs/reliability.md"
BEGIN, END = "<!-- written by make fuzz -->\n", "<!-- end of make fuzz -->"
MEMORY = 2048  # MB, with which a target has leaked


def fuzz(target: str, options: list[str]) -> None:
    """In this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["shoal.protos", "shoal.server", "google.protobuf"]):
        module = importlib.import_module(f"tests.fuzz.{target}")

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = module.mutate(data, rng) if rng.random() < 0.7 else atheris.Mutate(data, most)
        return changed if len(changed) <= most else data

    atheris.Setup([sys.argv[0], *options], module.run, custom_mutator=change)
    atheris.Fuzz()


def campaign(target: str, seconds: int) -> dict[str, Any]:
    """In a process of its own, from right inputs on."""
    BROKEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(importlib.import_module(f"tests.fuzz.{target}").seeds()):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY}", "-max_len=4096", "-timeout=60"]
        options += ["-print_final_stats=1", f"-artifact_prefix={BROKEN}/{target}-", corpus]
        command = [sys.executable, "-m", "tests.fuzz.campaign", "--fuzz", target, *options]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    read = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    seen = re.findall(r"cov: (\d+) .*?rss: (\d+)Mb", done.stderr)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return {
        "target": target,
        "seconds": seconds,
        "inputs": int(read.get("number_of_executed_units", 0)),
        "coverage": [int(cover) for cover, _ in (seen[0], seen[-1])] if seen else [],
        "memory_mb": [int(memory) for _, memory in (seen[len(seen) // 10], seen[-1])] if seen else [],
        "broken": done.returncode != 0,
    }


def table(found: dict[str, Any]) -> str:
    head = "| fuzzed | minutes | inputs | branches seen, first → last | MB, after a tenth → at the end | crashed |"
    rows = [head, "|---|--:|--:|--:|--:|---|"]
    for row in found["targets"]:
        inputs, minutes, crashed = f"{row['inputs']:,}", f"{row['seconds'] / 60:g}", "yes" if row["broken"] else "no"
        cover, memory = (" → ".join(map(str, row[key])) for key in ("coverage", "memory_mb"))
        rows.append(f"| {TARGETS[row['target']]} | {minutes} | {inputs} | {cover} | {memory} | {crashed} |")
    return "\n".join([*rows, "", f"atheris {found['atheris']}, {found['machine']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--only", choices=TARGETS, help="one target; what is published of the other stays")
    parser.add_argument("--publish", action="store_true")
    asked = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "atheris": version("atheris"),
        "targets": [campaign(target, round(30 * asked.minutes)) for target in TARGETS if asked.only in (None, target)],
    }
    if asked.only:
        before = json.loads((ROOT / RESULTS).read_text("utf-8"))["targets"]
        found["targets"] += [row for row in before if row["target"] != asked.only]
        found["targets"].sort(key=lambda row: list(TARGETS).index(row["target"]))
    print(table(found))
    if asked.publish:
        (ROOT / RESULTS).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n\n{END}{rest.partition(END)[2]}", "utf-8")
    if any(target["broken"] for target in found["targets"]):
        raise SystemExit(f"an input broke a target; it is kept in {BROKEN}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        main()
