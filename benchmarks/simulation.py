"""The time of a round: Shoal's lean engine beside a loop written by hand and flwr's own simulation, all doing the same.

Run it on a quiet machine (``make bench`` does both lines; ``--help`` shows how to run a part of it):

    pip install -e ".[bench]"
    python benchmarks/simulation.py

Contenders: ``plain`` is examples/plain_fedavg.py, one process; ``shoal-1`` and ``shoal-2`` have 1 and 2 worker
processes; ``flwr`` is its simulation on Ray with 2 actors of one CPU each. Every process runs one thread. All start from
the same weights, take part in every round, and see their examples in the same order, named by the seed alone; so all
must end at the weights of the plain loop, and the benchmark fails where they do not. No one evaluates.

A round is timed from its start to the start of the next, so it holds all there is to it: choosing, sending, training,
summing, recording. The first one is left out, the median of the others is taken, then the median of the repetitions, for
which contenders take turns. The time to the end of the first round counts from the start of the process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from shoal import Experiment, LocalTraining
from shoal.client.models import lenet, linear, mlp
from shoal.protos.seeds import stream
from shoal.simulations.engine import build_module
from shoal.simulations.federated import ArrayData
from shoal.strategies.selectors import Selector

if TYPE_CHECKING:
    from flwr.app import Context, Message


@dataclass(frozen=True)
class Workload:
    """``clients`` of ``examples`` each, all of them in every round, one local epoch of SGD."""

    title: str
    model: Callable[[tuple[int, ...], int], nn.Module]
    shape: tuple[int, ...]
    clients: int
    examples: int
    rounds: int = 12
    batch: int = 10
    lr: float = 0.05

    @property
    def steps(self) -> int:
        """Client-steps a round."""
        return self.clients * -(-self.examples // self.batch)

    @property
    def names(self) -> list[str]:
        return [str(number) for number in range(self.clients)]

    def data(self) -> ArrayData:
        """Random examples, labelled by a random linear function; the same in every process."""
        generator, n = torch.Generator().manual_seed(0), self.examples
        x = torch.randn(self.clients * n, *self.shape, generator=generator)
        teacher = torch.randn(x[0].numel(), CLASSES, generator=generator)
        offsets = {name: (i * n, (i + 1) * n, (i + 1) * n) for i, name in enumerate(self.names)}
        return ArrayData(x, (x.flatten(1) @ teacher).argmax(dim=1), offsets, classes=CLASSES)

    def start(self) -> nn.Module:
        """The model with Shoal's initial weights."""
        return build_module(lambda: self.model(self.shape, CLASSES), SEED, "float32")

    def orders(self, round: int, client: str) -> list[Tensor]:
        """The order of a client's examples in its one epoch, as Shoal draws it."""
        return [torch.from_numpy(stream(SEED, "batches", round, client).permutation(self.examples))]


SEED, CLASSES, TOLERANCE = 0, 10, 1e-3
WORKLOADS = {
    "logistic": Workload("logistic regression 784→10", linear, (784,), clients=100, examples=60),
    "2nn": Workload("2NN 784→200→200→10", mlp, (784,), clients=100, examples=60),
    "lenet": Workload("LeNet on 3×32×32", lenet, (3, 32, 32), clients=50, examples=50),
}
ROOT = Path(__file__).resolve().parents[1]
PLAIN = runpy.run_path(str(ROOT / "examples" / "plain_fedavg.py"), run_name="plain_fedavg")
QUIET = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"), "0"),
}

# --- contenders: each calls lap() at the start of every round and returns the final weights, in one vector ------------


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def plain(work: Workload, rounds: int, lap: Callable[[], None]) -> Tensor:
    model, data = work.start(), work.data()
    shards = {name: (data.shard(name).x, data.shard(name).y) for name in work.names}

    def orders(round: int, client: str) -> list[Tensor]:
        if client == work.names[0]:
            lap()
        return work.orders(round, client)

    PLAIN["fedavg"](model, shards, [work.names] * rounds, orders, work.lr, work.batch)
    return flat(model)


class Everyone(Selector):
    """Asks all clients; called at the start of every round, so it keeps the time."""

    def __init__(self, lap: Callable[[], None]) -> None:
        self._lap = lap

    def select(
        self, state: Mapping[str, Any], population: Sequence[str], count: int, round: int, rng: np.random.Generator
    ) -> Sequence[str]:
        self._lap()
        return population


def lean(work: Workload, rounds: int, lap: Callable[[], None], *, workers: int) -> Tensor:
    local = LocalTraining(lr=work.lr, batch_size=work.batch, epochs=1)
    experiment = Experiment(
        model=work.model, data=work.data(), local=local, rounds=rounds, cohort=work.clients, seed=SEED,
        selector=Everyone(lap),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return experiment.simulate(workers=workers, out=folder, progress="none").parameters.trainable


@cache
def resident(name: str) -> tuple[nn.Module, ArrayData]:
    """What an actor keeps between clients: the model and the data."""
    torch.set_num_threads(1)
    return WORKLOADS[name].start(), WORKLOADS[name].data()


def answer(message: Message, context: Context) -> Message:
    """flwr's client: load the weights that came, train with the plain loop's function, send the weights back."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    sent = message.content.config_records["config"]
    name, client, round = (
        str(sent["workload"]),
        str(context.node_config["partition-id"]),
        int(str(sent["server-round"])),
    )
    work, (model, data) = WORKLOADS[name], resident(name)
    shard = data.shard(client)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    PLAIN["train"](model, shard.x, shard.y, work.orders(round, client), work.lr, work.batch)
    trained = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(shard)})}
    return Message(RecordDict(trained), reply_to=message)


def flower(work: Workload, rounds: int, lap: Callable[[], None]) -> Tensor:
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    class Timed(FedAvg):
        def configure_train(self, *arguments: Any, **named: Any) -> Any:
            lap()
            return super().configure_train(*arguments, **named)

    client, server, model, n = ClientApp(), ServerApp(), work.start(), work.clients
    client.train()(answer)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=n, min_evaluate_nodes=0, min_available_nodes=n)
        config = ConfigRecord({"workload": next(name for name, known in WORKLOADS.items() if known is work)})
        result = strategy.start(grid, ArrayRecord(model.state_dict()), rounds, train_config=config)
        model.load_state_dict(result.arrays.to_torch_state_dict())

    backend: Any = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=n, backend_config=backend)
    return flat(model)


CONTENDERS: dict[str, Callable[[Workload, int, Callable[[], None]], Tensor]] = {
    "plain": plain,
    "shoal-1": partial(lean, workers=1),
    "shoal-2": partial(lean, workers=2),
    "flwr": flower,
}

# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One contender's run: the median round without the first, and when the first had ended."""

    round_seconds: float
    first_round_seconds: float
    weights: np.ndarray


def contend(contender: str, workload: str, rounds: int, launched: float, out: str) -> None:
    """In a process of its own: run and write down what came out."""
    torch.set_num_threads(1)
    starts = list[float]()
    weights = CONTENDERS[contender](WORKLOADS[workload], rounds, lambda: starts.append(time.perf_counter()))
    first = time.time() - launched - (time.perf_counter() - starts[1])
    np.savez(out, weights=weights.numpy(), rounds=np.diff(starts)[1:], first=first)


def measure(contender: str, workload: str, rounds: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.npz"
        order = json.dumps([contender, workload, rounds, time.time(), str(out)])
        command = [sys.executable, str(Path(__file__).resolve()), "--contend", order]
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=1800)
        if done.returncode or not out.exists():
            sys.exit(f"{contender} failed on {workload}:\n{(done.stdout + done.stderr)[-4000:]}")
        found = np.load(out)
        return Measured(float(np.median(found["rounds"])), float(found["first"]), found["weights"])


def rows(work: Workload, runs: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, Any]]:
    """A line of figures for each contender; ``difference`` is the norm, relative to the plain loop's weights."""
    seconds = {contender: median(run.round_seconds for run in made) for contender, made in runs.items()}
    theirs = runs["plain"][0].weights.astype(np.float64)
    return {
        contender: {
            "ms_per_round": 1e3 * seconds[contender],
            "us_per_client_step": 1e6 * seconds[contender] / work.steps,
            "times_faster_than_plain": seconds["plain"] / seconds[contender],
            "times_faster_than_flwr": seconds["flwr"] / seconds[contender] if "flwr" in seconds else None,
            "first_round_after_seconds": median(run.first_round_seconds for run in made),
            "difference": max(float(np.linalg.norm(run.weights - theirs) / np.linalg.norm(theirs)) for run in made),
            "ms_per_round_of_each": [1e3 * run.round_seconds for run in made],
        }
        for contender, made in runs.items()
    }


# --- report -----------------------------------------------------------------------------------------------------------


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": (models or [platform.processor()])[0], "cores": os.cpu_count(), "system": platform.platform()}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("shoal", "torch", "numpy", "flwr", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    shown = Table("", "ms / round", "µs / client-step", "plain ÷ it", "flwr ÷ it", "first round after", "difference")
    for column in shown.columns[1:]:
        column.justify = "right"
    for workload, lines in results.items():
        shown.add_section()
        work = WORKLOADS[workload]
        shown.add_row(f"[bold]{work.title}, {work.clients} clients × {work.examples}")
        for contender, r in lines.items():
            to_flwr = r["times_faster_than_flwr"]
            shown.add_row(
                contender, f"{r['ms_per_round']:.1f}", f"{r['us_per_client_step']:.1f}",
                f"{r['times_faster_than_plain']:.2f}", "" if to_flwr is None else f"{to_flwr:.2f}",
                f"{r['first_round_after_seconds']:.1f} s", f"{r['difference']:.0e}",
            )  # fmt: skip
    return shown


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition of a few rounds")
    parser.add_argument("--without", action="append", default=[], choices=[c for c in CONTENDERS if c != "plain"])
    parser.add_argument("--only", action="append", choices=list(WORKLOADS), help="this workload; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "simulation.json")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen, console = options(), Console()
    if chosen.contend:
        contend(*json.loads(chosen.contend))
        return 0
    contenders = [contender for contender in CONTENDERS if contender not in chosen.without]
    if "flwr" in contenders and find_spec("ray") is None:
        console.print('flwr cannot simulate here: pip install "flwr\\[simulation]", or give --without flwr')
        return 2
    before = load_average()
    if before is not None and before > 1:
        console.print(f"[yellow]the load average is {before:.1f}: other work on this machine makes these figures worse")
    results = dict[str, dict[str, dict[str, Any]]]()
    for workload in chosen.only or WORKLOADS:
        work, runs = WORKLOADS[workload], {contender: list[Measured]() for contender in contenders}
        for repetition in range(1 if chosen.quick else 3):
            for contender in contenders:
                with console.status(f"{workload}: {contender}, repetition {repetition + 1}"):
                    runs[contender].append(measure(contender, workload, 4 if chosen.quick else work.rounds))
        results[workload] = rows(work, runs)
    report = {"machine": machine(), "versions": versions(), "load_average": {"before": before, "after": load_average()}}
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(report | {"command": command, "workloads": results}, indent=2) + "\n")
    console.print(table(results), f"written to {chosen.out}")
    differing = [
        f"{c} on {w}" for w, lines in results.items() for c, r in lines.items() if not r["difference"] <= TOLERANCE
    ]
    if differing:
        console.print(f"[red]not the plain loop's weights (difference above {TOLERANCE}): {', '.join(differing)}")
    return 1 if differing else 0


if __name__ == "__main__":
    # By its name, so that flwr's actors import what they run and keep it, in place of unpickling it for every client.
    sys.exit(import_module(Path(__file__).stem).main())
