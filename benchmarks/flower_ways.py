"""A Flower app, unmodified, both ways: on flwr's own simulation and on Shoal, each run in a process of its own.

An app takes ``result`` among its config, a file of NumPy arrays that it writes itself. Needs
``pip install 'flwr[simulation]'``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Done", "distance", "under_flower", "under_shoal"]

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
PATIENCE = 900  # seconds


@dataclass(frozen=True)
class Done:
    """A process that has ended: when it began by the machine's monotonic clock, how long it took, what it found."""

    began: float
    seconds: float
    arrays: dict[str, np.ndarray]


def under_flower(app: Path, nodes: int, config: Mapping[str, Any], folder: Path) -> Done:
    """On flwr's simulation, with two actors of one CPU each."""
    result = folder / "flwr.npz"
    given = json.dumps({**config, "result": str(result)})
    return _measured([sys.executable, "-m", "benchmarks.flower_ways", str(app), str(nodes), given], result)


def under_shoal(app: Path, nodes: int, config: Mapping[str, Any], folder: Path, workers: int = 2) -> Done:
    """On Shoal, with as many worker processes; 0: all in one process."""
    result = folder / "shoal.npz"
    command = [sys.executable, "-c", "from shoal.cli import main; main()", "flower", "run", str(app)]
    command += [f"{key}={json.dumps(value)}" for key, value in config.items()] + [f"result={result}"]
    command += ["--nodes", str(nodes), "--workers", str(workers), "--out", str(folder / "runs")]
    return _measured(command, result)


def _measured(command: Sequence[str], result: Path) -> Done:
    result.unlink(missing_ok=True)
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=PATIENCE)
    seconds = time.monotonic() - began
    if done.returncode or not result.exists():
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    with np.load(result) as arrays:
        return Done(began, seconds, {name: arrays[name] for name in arrays.files})


def distance(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """The largest difference, relative to what is larger: 1 or the expected value."""
    if expected.keys() != found.keys():
        return float("inf")
    pairs = [(expected[name], found[name]) for name in expected]
    return max(float(np.max(abs(a - b) / np.maximum(1, abs(a)), initial=0)) for a, b in pairs)


def main() -> None:
    """In a process of its own: the app on flwr's simulation, as ``flwr run`` would start it, without its servers."""
    from flwr.app import Context, RecordDict
    from flwr.common.config import get_fused_config_from_dir, get_project_config
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    path, nodes, config = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    components = get_project_config(path)["tool"]["flwr"]["app"]["components"]
    run = Run.create_empty(1)
    run.primary_task_id, run.federation_id, run.override_config = 1, NOOP_FEDERATION_ID, config
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    fused = get_fused_config_from_dir(path, run.override_config)
    backend: Any = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app_attr=components["clientapp"],
        server_app_attr=components["serverapp"],
        server_app_context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=fused),
        app_dir=str(path),
        run=run,
        backend_config=backend,
        is_app=True,
    )


if __name__ == "__main__":
    main()
