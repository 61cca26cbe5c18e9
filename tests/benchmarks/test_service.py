"""The service's benchmark runs; what it measures is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_service_sums_what_it_is_sent(tmp_path: Path) -> None:
    out = tmp_path / "service.json"
    command = [sys.executable, str(BENCHMARKS / "service.py"), "--megabytes", "1", "--repetitions", "1"]
    done = subprocess.run([*command, "--counts", "4", "--out", str(out)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads(out.read_text())["lines"]
    assert min(line["memory_over_bare"], line["durable_over_floor"], *line["MiB_per_second"].values()) > 0
