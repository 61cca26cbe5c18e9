"""SCAFFOLD and FedNova from Shoal in a real Flower deployment: one SuperLink, two SuperNodes, on loopback.

    python -m benchmarks.flower_deployment

Starts flwr's own processes with a home of their own, runs ``examples/flower_scaffold`` with ``flwr run``, and compares
the final model with that of Shoal's own simulation, bit for bit. Takes minutes: flwr starts a process for each message.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np

APP = Path(__file__).parent.parent / "examples" / "flower_scaffold"
PATIENCE = 600.0  # seconds for a run
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def deployment(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink and two SuperNodes; the environment in which ``flwr run`` finds them. All end with it."""
    link, ports = free_port(), (free_port(), free_port())
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    env = os.environ | quiet | {"FLWR_HOME": str(home), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    here = f"127.0.0.1:{link}"
    config = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{here}"\ninsecure = true\n'
    (home / "config.toml").write_text(config)
    commands = [["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link)]]
    for partition, port in enumerate(ports):
        about = f"partition-id={partition} num-partitions=2"
        node = ["flower-supernode", "--insecure", "--superlink", here, "--host", "127.0.0.1", "--port", str(port)]
        commands.append([*node, "--node-config", about])
    running = list[subprocess.Popen[bytes]]()
    try:
        for command in commands:
            name = f"{command[0]}-{len(running)}.log"
            with (home / name).open("wb") as log:
                found = [str(BIN / command[0]), *command[1:]]
                running.append(subprocess.Popen(found, env=env, stdout=log, stderr=log, start_new_session=True))
            time.sleep(5 if len(running) == 1 else 0)  # a SuperNode that finds no SuperLink waits longer
        yield env
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()


def run(strategy: str, env: dict[str, str], result: Path) -> dict[str, np.ndarray]:
    """The final model of ``flwr run``; SystemExit if there is none in time."""
    config = f"strategy='{strategy}' result='{result}'"
    subprocess.run([str(BIN / "flwr"), "run", str(APP), "here", "--run-config", config], env=env, check=True)
    ends = time.monotonic() + PATIENCE
    while not result.exists():
        if time.monotonic() > ends:
            raise SystemExit(f"{strategy} has not finished; see the logs in {env['FLWR_HOME']}")
        time.sleep(0.5)
    time.sleep(1)  # it is being written
    with np.load(result) as arrays:
        return {name: arrays[name] for name in arrays.files}


def expected(strategy: str, folder: Path) -> dict[str, np.ndarray]:
    """Of Shoal's own simulation."""
    spec = spec_from_file_location("flower_scaffold", APP / "app.py")
    assert spec is not None and spec.loader is not None
    app: Any = module_from_spec(spec)
    spec.loader.exec_module(app)
    done = app.experiment(strategy).simulate(engine="lean", workers=0, out=folder, progress="none")
    return {name: tensor.numpy() for name, tensor in done.parameters.named().items()}


def main() -> None:
    equal = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, deployment(Path(folder)) as env:
        for strategy in ("scaffold", "fednova"):
            began = time.perf_counter()
            found = run(strategy, env, Path(folder) / f"{strategy}.npz")
            seconds = time.perf_counter() - began
            wanted = expected(strategy, Path(folder) / "runs")
            same = found.keys() == wanted.keys() and all(np.array_equal(found[n], wanted[n]) for n in wanted)
            equal &= same
            print(json.dumps({"strategy": strategy, "equal": same, "seconds": round(seconds, 1)}), flush=True)
    sys.exit(0 if equal else "a result differs from Shoal's own")


if __name__ == "__main__":
    main()
