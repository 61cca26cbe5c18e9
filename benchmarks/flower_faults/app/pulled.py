"""A Flower app whose clients pull a vector towards points of their own, so that its end is known in closed form.

It writes a trace of what happens, and the model of each round as Flower's documentation shows it (in ``evaluate_fn``).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

SIZE = 1_000_000  # 8 MB: a message of several objects
KEPT = 0.5  # of the distance to its own point that is left when a client has trained
SECONDS = 2.0  # that training takes: there is time to be killed in it

server = ServerApp()
client = ClientApp()


def point(node: int) -> np.ndarray:
    """Where client ``node`` pulls to; [SIZE], float64."""
    return np.random.default_rng(node).normal(size=SIZE)


def examples(node: int) -> int:
    return 10 * (node + 1)


def expected(nodes: int, rounds: int) -> np.ndarray:
    """The model after FedAvg of all clients in all rounds, from zeros: a geometric series."""
    weights = [examples(node) for node in range(nodes)]
    mean = sum(weight * point(node) for node, weight in enumerate(weights)) / sum(weights)
    return np.asarray((1 - KEPT**rounds) * mean)


def note(folder: Any, what: str, **more: Any) -> None:
    """A line of the trace, in one write."""
    line = json.dumps({"time": time.monotonic(), "what": what, **more}) + "\n"
    trace = os.open(Path(folder) / "trace.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(trace, line.encode())
    os.close(trace)


def model(folder: Any, number: int) -> Path:
    return Path(folder) / f"round-{number}.npy"


@client.train()
def train(message: Message, context: Context) -> Message:
    node, folder = int(context.node_config["partition-id"]), context.run_config["folder"]
    (vector,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    note(folder, "training", node=node)
    time.sleep(SECONDS)
    mine = point(node) + KEPT * (vector - point(node))
    note(folder, "trained", node=node)
    content: Any = {"arrays": ArrayRecord([mine]), "metrics": MetricRecord({"num-examples": examples(node)})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    folder, done = context.run_config["folder"], int(context.run_config["done"])
    rounds, nodes = int(context.run_config["rounds"]), int(context.run_config["nodes"])
    start = np.load(model(folder, done)) if done else np.zeros(SIZE)

    def keep(number: int, arrays: ArrayRecord) -> MetricRecord:
        path = model(folder, done + number)
        aside = path.with_suffix(".new")
        with aside.open("wb") as file:
            np.save(file, arrays.to_numpy_ndarrays()[0])
        aside.replace(path)
        note(folder, "round", number=done + number)
        return MetricRecord({"kept": 1.0})

    all_of_them: Any = {"min_train_nodes": nodes, "min_available_nodes": nodes}
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **all_of_them)
    strategy.start(grid, ArrayRecord([start]), rounds - done, evaluate_fn=keep)
    note(folder, "finished")
