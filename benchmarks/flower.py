"""flwr's own simulation: two Ray actors of one CPU each, which keep model and data.

A node trains the client that its message names: which of flwr's nodes are asked is drawn by flwr, but who they play,
and in which order, is the task's. The message carries weights, round and position, as it would carry a configuration.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from benchmarks.contenders import PLAIN, Tensors
from benchmarks.nets import loaded, weights_of
from benchmarks.tasks import Task

__all__ = ["flower"]


def flower(task: Task) -> np.ndarray:
    model = loaded(task.net, task.initial)
    initial = ArrayRecord(model.state_dict())
    client, server = ClientApp(), ServerApp()
    client.train()(_train)

    class Timed(FedAvg):
        def configure_train(self, server_round: int, *given: Any) -> Any:
            task.lap()
            messages = list(super().configure_train(server_round, *given))
            for position, message in enumerate(messages):
                where = ConfigRecord({"task": str(task.folder), "round": server_round, "position": position})
                message.content = RecordDict({"arrays": message.content["arrays"], "config": where})
            return messages

    @server.main()
    def main(grid: Any, context: Any) -> None:
        few: Any = {"min_train_nodes": task.cohort, "min_available_nodes": task.cohort}
        # A share of the nodes rounds down: the least number is what decides.
        strategy = Timed(fraction_train=0.5 * task.cohort / task.registered, fraction_evaluate=0.0, **few)
        result = strategy.start(grid, initial, task.rounds)
        model.load_state_dict(result.arrays.to_torch_state_dict())

    random.seed(0)
    backend: Any = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=task.registered, backend_config=backend)
    return weights_of(model)


@lru_cache(maxsize=1)
def _resident(folder: str) -> tuple[Task, Tensors, nn.Module]:
    task = Task(Path(folder))
    return task, Tensors(task), loaded(task.net, task.initial)


def _train(message: Message, context: Any) -> Message:
    """Load the weights that came, train as the plain loop does, send the weights back."""
    config: Any = message.content["config"]
    arrays: Any = message.content["arrays"]
    task, tensors, model = _resident(config["task"])
    client, order = task.cohorts[config["round"] - 1][config["position"]], task.orders[config["round"] - 1]
    x, y = tensors[str(client)]
    model.load_state_dict(arrays.to_torch_state_dict())
    PLAIN["train"](model, x, y, [torch.from_numpy(order[config["position"]])], task.lr, task.batch)
    counted = MetricRecord({"num-examples": len(x)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": counted}), reply_to=message)
