"""What each strategy costs: lines of code, bytes and state beside FedAvg's, and the time of a round over FedAvg's.

    python -m benchmarks.strategies            # writes benchmarks/results/strategies.json and docs/strategies.md

A small network with batch normalisation, 40 clients of 60 examples, 20 a round, on the lean engine in one process; all
strategies take turns, and the fastest of all their rounds counts, which other work on the machine disturbs least.
"""

from __future__ import annotations

import ast
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shoal
from shoal.catalog import page
from shoal.client.net import parameters_of
from shoal.protos import registry
from shoal.simulations.federated import ArrayData

ROOT = Path(__file__).parents[1]
REPETITIONS, ROUNDS, CLIENTS, SIZE = 5, 8, 40, 60


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 10))


def data() -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS * SIZE, 100, generator=generator)
    y = torch.randint(0, 10, (CLIENTS * SIZE,), generator=generator)
    return ArrayData(x, y, {f"c{i}": (i * SIZE, (i + 1) * SIZE, (i + 1) * SIZE) for i in range(CLIENTS)}, classes=10)


def lines(name: str) -> int:
    """Of the class, without its docstring and blank lines."""
    tree = ast.parse((ROOT / "strategies" / f"{name}.py").read_text("utf-8"))
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    covered = {line for node in made.body[1:] for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    helpers = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return len(covered) + sum((node.end_lineno or 0) - node.lineno + 1 for node in helpers) + 1


def rounds(name: str, out: Path) -> Any:
    made = registry.load("shoal.strategies", name)()
    local = shoal.LocalTraining(lr=0.01, batch_size=10)
    run = shoal.Experiment(model=net, data=data(), strategy=made, local=local, rounds=ROUNDS, cohort=20)
    return run.simulate(engine="lean", workers=0, out=out, progress="none").metrics.iloc[-ROUNDS + 1 :]


def main() -> None:
    names, parameters = registry.names("shoal.strategies"), parameters_of(net()).trainable
    seconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(REPETITIONS):
            for name in names:
                metrics = rounds(name, Path(folder))
                seconds[name] += metrics["train_seconds"].tolist()
                strategy = registry.load("shoal.strategies", name)()
                states = {
                    "client": strategy.init_client(parameters).values(),
                    "server": [v for v in strategy.init(parameters).values() if isinstance(v, torch.Tensor)],
                }
                kept = {f"{where}_state": sum(t.nbytes for t in tensors) for where, tensors in states.items()}
                found[name] = {which: float(metrics[which].iloc[-1]) for which in ("bytes_down", "bytes_up")} | kept
    base, model = found["fedavg"], parameters.nbytes
    result = {
        name: {
            "lines": lines(name),
            "down": cost["bytes_down"] / base["bytes_down"],
            "up": cost["bytes_up"] / base["bytes_up"],
            "client_state": cost["client_state"] / model,
            "server_state": cost["server_state"] / model - 1,
            "time": min(seconds[name]) / min(seconds["fedavg"]),
        }
        for name, cost in found.items()
    }
    (ROOT / "benchmarks" / "results" / "strategies.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    (ROOT / "docs" / "strategies.md").write_text(page(result), "utf-8")


if __name__ == "__main__":
    main()
