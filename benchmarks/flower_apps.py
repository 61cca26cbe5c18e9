"""Flower apps, unmodified, on flwr's own simulation and on Shoal: are the results equal, and how long does each take?

    python -m benchmarks.flower_apps                       # all of tests/flower/apps, both ways, in turns
    python -m benchmarks.flower_apps --apps legacy,trees
    python -m benchmarks.flower_apps --record              # and keep flwr's results for the tests

Each run is a process of its own, from its start to its end; needs ``pip install 'flwr[simulation]'``. Apps choose
their cohorts by names or ask everybody, because flwr gives its nodes new ids in every run. What an app has worked out
it writes to a file of NumPy arrays itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

APPS = Path(__file__).parent.parent / "tests" / "flower" / "apps"
EXPECTED = APPS.parent / "expected.json"
NODES = 4
TOLERANCES = {"secagg": 1e-3, "trees": 1e-5}  # one rounds at random, the other computes in single precision
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def by_flower(name: str, result: str) -> None:
    """In a process of its own: the app on flwr's simulation, as ``flwr run`` would start it, without its servers."""
    from flwr.app import Context, RecordDict
    from flwr.common.config import get_fused_config_from_dir, get_project_config
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    path = APPS / name
    components = get_project_config(path)["tool"]["flwr"]["app"]["components"]
    run = Run.create_empty(1)
    run.primary_task_id, run.federation_id, run.override_config = 1, NOOP_FEDERATION_ID, {"result": result}
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    config = get_fused_config_from_dir(path, run.override_config)
    backend: Any = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    _run_simulation(
        num_supernodes=NODES,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app_attr=components["clientapp"],
        server_app_attr=components["serverapp"],
        server_app_context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config),
        app_dir=str(path),
        run=run,
        backend_config=backend,
        is_app=True,
    )


def measured(command: Sequence[str], result: Path) -> tuple[float, list[np.ndarray]]:
    """Seconds that a process takes, and the arrays that its app has written."""
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    with np.load(result) as arrays:
        return seconds, [arrays[name] for name in arrays.files]


def under_flower(name: str, folder: Path) -> tuple[float, list[np.ndarray]]:
    """Seconds and results of an app on flwr's simulation."""
    result = folder / f"{name}-flwr.npz"
    return measured([sys.executable, "-m", "benchmarks.flower_apps", "--flower", name, str(result)], result)


def under_shoal(name: str, folder: Path) -> tuple[float, list[np.ndarray]]:
    """The same on Shoal, in two worker processes as flwr has two actors."""
    result = folder / f"{name}-shoal.npz"
    command = [sys.executable, "-c", "from shoal.cli import main; main()", "flower", "run", str(APPS / name)]
    command += [f"result={result}", "--nodes", str(NODES), "--workers", "2", "--out", str(folder / "runs")]
    return measured(command, result)


def distance(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The largest difference, relative to what is larger: 1 or the expected value."""
    pairs = zip(expected, found, strict=True)
    return max(float(np.max(abs(a - b) / np.maximum(1, abs(a)), initial=0)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apps", default=",".join(sorted(path.parent.name for path in APPS.glob("*/pyproject.toml"))))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--flower", nargs=2, metavar=("APP", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flower:
        by_flower(*options.flower)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.record:
            for name in options.apps.split(","):
                record(name, Path(folder))
        else:
            compare(options.apps.split(","), Path(folder))


def record(name: str, folder: Path) -> None:
    """Keep flwr's result of an app for the tests."""
    kept = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {"results": {}}
    seconds, arrays = under_flower(name, folder)
    kept |= {"flwr": version("flwr"), "nodes": NODES}
    kept["results"][name] = [array.tolist() for array in arrays]
    EXPECTED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"app": name, "recorded": True, "seconds": round(seconds, 2)}), flush=True)


def compare(names: Sequence[str], folder: Path) -> None:
    """Both ways, in turns; the exit code is 0 if all results are equal."""
    wrong = []
    for name in names:
        (theirs, expected), (ours, found) = under_flower(name, folder), under_shoal(name, folder)
        apart = distance(expected, found)
        equal = apart <= TOLERANCES.get(name, 1e-9)
        wrong += [] if equal else [name]
        seconds = {"flwr": round(theirs, 2), "shoal": round(ours, 2)}
        print(json.dumps({"app": name, "equal": equal, "apart": apart, "seconds": seconds}), flush=True)
    sys.exit(f"differ: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
