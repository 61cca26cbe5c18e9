"""The time of a round: Shoal's lean engine beside a loop written by hand and flwr's own simulation, doing the same.

    pip install -e ".[bench]"
    python benchmarks/simulation.py

``make bench`` does both; ``--help`` shows how to run a part of it. Use a quiet machine with two cores or more.

Contenders: ``plain`` is examples/plain_fedavg.py, one process; ``shoal-1`` and ``shoal-2`` have 1 and 2 workers;
``flwr`` is its simulation on Ray with 2 actors of one CPU each, which keep model and data. Every process runs one
thread. All begin with the same weights, ask every client in every round, evaluate nothing, and give a client its
examples in the same order; so all must end at the weights of the plain loop, else the benchmark fails.

A round is timed from its start to the start of the next, so it holds all there is to it. The first is left out, the
median of the others is taken, then the median of the repetitions, in which contenders take turns. "First round" is
the time from the start of the process, imports included, to the end of that round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal import Experiment, LocalTraining
from shoal.client.models import lenet, linear, mlp
from shoal.client.net import build_module
from shoal.protos.seeds import stream
from shoal.simulations.federated import ArrayData
from shoal.strategies.selectors import Selector

SEED, CLASSES, BATCH, LR, TOLERANCE = 0, 10, 10, 0.05, 1e-3
ROOT = Path(__file__).resolve().parents[1]
PLAIN = runpy.run_path(str(ROOT / "examples" / "plain_fedavg.py"), run_name="plain_fedavg")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
NO_TELEMETRY = dict.fromkeys(("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"), "0")
torch.set_num_threads(1)

Lap = Callable[[], None]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """``clients`` of ``examples`` each: random, labelled by a random linear function."""

    title: str
    make: Callable[[tuple[int, ...], int], nn.Module]
    shape: tuple[int, ...]
    clients: int
    examples: int
    rounds: int = 12

    @cached_property
    def data(self) -> ArrayData:
        generator, n = torch.Generator().manual_seed(SEED), self.examples
        x = torch.randn(self.clients * n, *self.shape, generator=generator)
        y = (x.flatten(1) @ torch.randn(x[0].numel(), CLASSES, generator=generator)).argmax(dim=1)
        ends = range(n, len(x) + 1, n)
        return ArrayData(x, y, {str(i): (end - n, end, end) for i, end in enumerate(ends)}, classes=CLASSES)

    @cached_property
    def model(self) -> nn.Module:
        """At first with the weights that Shoal begins with."""
        return build_module(lambda: self.make(self.shape, CLASSES), SEED, "float32")

    @property
    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    def orders(self, round: int, client: str) -> list[Tensor]:
        """The order of a client's examples in its one epoch, as Shoal draws it."""
        return [torch.from_numpy(stream(SEED, "batches", round, client).permutation(self.examples))]


WORKLOADS = {
    "logistic": Workload("logistic regression 784→10", linear, (784,), clients=100, examples=60),
    "2nn": Workload("2NN 784→200→200→10", mlp, (784,), clients=100, examples=60),
    "lenet": Workload("LeNet on 3×32×32", lenet, (3, 32, 32), clients=50, examples=50),
}


# Contenders. Each calls lap() when a round starts and returns the weights it ends with.


def plain(name: str, rounds: int, lap: Lap) -> Tensor:
    work = WORKLOADS[name]
    shards = {client: (work.data.shard(client).x, work.data.shard(client).y) for client in work.data.clients}

    def orders(round: int, client: str) -> list[Tensor]:
        if client == work.data.clients[0]:
            lap()
        return work.orders(round, client)

    PLAIN["fedavg"](work.model, shards, [work.data.clients] * rounds, orders, LR, BATCH)
    return work.weights


def lean(name: str, rounds: int, lap: Lap, *, workers: int) -> Tensor:
    class Everyone(Selector):
        def select(self, state: Any, population: Sequence[str], *_: Any) -> Sequence[str]:
            lap()
            return population

    work, local = WORKLOADS[name], LocalTraining(lr=LR, batch_size=BATCH, epochs=1)
    everyone: Any = {"cohort": work.clients, "selector": Everyone()}
    experiment = Experiment(model=work.make, data=work.data, local=local, rounds=rounds, seed=SEED, **everyone)
    with tempfile.TemporaryDirectory() as folder:
        return experiment.simulate(workers=workers, out=folder, progress="none").parameters.trainable


def flower(name: str, rounds: int, lap: Lap) -> Tensor:
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    class Timed(FedAvg):
        def configure_train(self, *given: Any, **named: Any) -> Any:
            lap()
            return super().configure_train(*given, **named)

    work, client, server = WORKLOADS[name], ClientApp(), ServerApp()
    initial = ArrayRecord(work.model.state_dict())  # made here: in flwr's thread, torch's generator is shared
    client.train()(flower_client)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients)
        config = ConfigRecord({"workload": name})
        result = strategy.start(grid, initial, rounds, train_config=config)
        work.model.load_state_dict(result.arrays.to_torch_state_dict())

    backend: Any = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=work.clients, backend_config=backend)
    return work.weights


def flower_client(message: Any, context: Any) -> Any:
    """Load the weights that came, train as the plain loop does, send the weights back."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    config, client = message.content["config"], str(context.node_config["partition-id"])
    work = WORKLOADS[config["workload"]]
    work.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    shard = work.data.shard(client)
    PLAIN["train"](work.model, shard.x, shard.y, work.orders(config["server-round"], client), LR, BATCH)
    counted = MetricRecord({"num-examples": len(shard)})
    return Message(RecordDict({"arrays": ArrayRecord(work.model.state_dict()), "metrics": counted}), reply_to=message)


CONTENDERS: dict[str, Callable[[str, int, Lap], Tensor]] = {
    "plain": plain,
    "shoal-1": partial(lean, workers=1),
    "shoal-2": partial(lean, workers=2),
    "flwr": flower,
}


def contend(contender: str, workload: str, rounds: int, launched: float, out: str) -> None:
    """One run of one contender, in a process of its own."""
    starts = list[float]()
    weights = CONTENDERS[contender](workload, rounds, lambda: starts.append(time.perf_counter()))
    first = time.time() - launched - (time.perf_counter() - starts[1])
    np.savez(out, weights=weights.double().numpy(), round=np.median(np.diff(starts)[1:]), first=first)


def measure(contender: str, workload: str, rounds: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.npz"
        order = [contender, workload, rounds, time.time(), str(out)]
        command = [sys.executable, __file__, "--contend", json.dumps(order)]
        quiet = os.environ | ONE_THREAD | NO_TELEMETRY | {"FLWR_HOME": folder}
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=3600)
        if done.returncode or not out.exists():
            sys.exit(f"{contender} failed on {workload}:\n{(done.stdout + done.stderr)[-4000:]}")
        return dict(np.load(out))


def figures(work: Workload, runs: Mapping[str, Sequence[Figures]]) -> dict[str, Figures]:
    """Medians for each contender; ``difference`` is a norm, relative to the norm of the plain loop's weights."""
    seconds = {contender: median(float(run["round"]) for run in made) for contender, made in runs.items()}
    steps, theirs, norm = work.clients * -(-work.examples // BATCH), runs["plain"][0]["weights"], np.linalg.norm
    return {
        contender: {
            "ms_per_round": 1e3 * seconds[contender],
            "us_per_client_step": 1e6 * seconds[contender] / steps,
            "plain_over_this": seconds["plain"] / seconds[contender],
            "flwr_over_this": seconds["flwr"] / seconds[contender] if "flwr" in seconds else None,
            "first_round_seconds": median(float(run["first"]) for run in made),
            "difference": max(float(norm(run["weights"] - theirs) / norm(theirs)) for run in made),
            "ms_of_each_repetition": [1e3 * float(run["round"]) for run in made],
        }
        for contender, made in runs.items()
    }


def show(work: Workload, lines: Mapping[str, Figures]) -> None:
    print(f"\n{work.title}, {work.clients} clients × {work.examples} examples")
    print("            ms/round  µs/client-step  plain/this  flwr/this  first round  difference")
    for contender, f in lines.items():
        ratio = "" if f["flwr_over_this"] is None else f"{f['flwr_over_this']:.2f}"
        times = f"{f['ms_per_round']:10.1f}{f['us_per_client_step']:16.1f}{f['plain_over_this']:12.2f}{ratio:>11}"
        print(f"{contender:10}{times}{f['first_round_seconds']:11.1f} s{f['difference']:12.0e}")


def circumstances() -> Figures:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    packages = [name for name in ("shoal", "torch", "numpy", "flwr", "ray") if find_spec(name)]
    return {
        "machine": {"processor": (models or [platform.processor()])[0], "cores": os.cpu_count()},
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition of a few rounds")
    parser.add_argument("--without", action="append", default=[], choices=list(CONTENDERS)[1:])
    parser.add_argument("--only", action="append", choices=list(WORKLOADS), help="may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "simulation.json")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = options()
    if chosen.contend:
        contend(*json.loads(chosen.contend))
        return 0
    contenders = [contender for contender in CONTENDERS if contender not in chosen.without]
    if "flwr" in contenders and not find_spec("ray"):
        print('flwr cannot simulate here: pip install "flwr[simulation]", or leave it out: --without flwr')
        return 2
    report, results = circumstances(), dict[str, dict[str, Figures]]()
    if (report["load_average"] or 0) > 1:
        print(f"warning: the load average is {report['load_average']:.1f}; other work distorts what is measured")
    for name in chosen.only or WORKLOADS:
        runs, rounds = {contender: list[Figures]() for contender in contenders}, WORKLOADS[name].rounds
        for _ in range(1 if chosen.quick else 3):
            for contender in contenders:
                runs[contender].append(measure(contender, name, 4 if chosen.quick else rounds))
                time.sleep(0 if chosen.quick else 5)  # what a contender leaves behind shall be gone
        results[name] = figures(WORKLOADS[name], runs)
        show(WORKLOADS[name], results[name])
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(report | {"workloads": results}, indent=2) + "\n", encoding="utf-8")
    wrong = [f"{c} on {name}" for name in results for c, f in results[name].items() if not f["difference"] <= TOLERANCE]
    print(f"\nwritten to {chosen.out}" + (f"\nNOT THE PLAIN LOOP'S WEIGHTS: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    # By its name: so flwr's actors import what they run, in place of unpickling it, and its cache, for every client.
    sys.exit(import_module(Path(__file__).stem).main())
