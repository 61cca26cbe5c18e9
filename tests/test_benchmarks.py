"""The benchmark runs, and fails unless all contenders arrive at the same weights. What it measures is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_simulation_contenders_agree(tmp_path: Path) -> None:
    out = tmp_path / "results" / "simulation.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "simulation.py"),
        "--quick",
        "--without",
        "flwr",
        "--only",
        "logistic",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert {"machine", "versions", "load_average", "command"} <= report.keys()
    lines = report["workloads"]["logistic"]
    assert list(lines) == ["plain", "shoal-1", "shoal-2"]
    assert lines["plain"]["difference"] == 0 < lines["shoal-2"]["difference"] <= 1e-3
    assert all(line["ms_per_round"] > 0 < line["first_round_seconds"] for line in lines.values())
    assert lines["shoal-1"]["flwr_over_this"] is None


@pytest.mark.slow
def test_the_service_sums_what_it_is_sent(tmp_path: Path) -> None:
    out = tmp_path / "service.json"
    command = [sys.executable, str(BENCHMARKS / "service.py"), "--megabytes", "1", "--repetitions", "1"]
    done = subprocess.run([*command, "--counts", "4", "--out", str(out)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads(out.read_text())["lines"]
    assert line["shoal_over_bare"] > 0 < line["MiB_per_second"]["shoal"]
