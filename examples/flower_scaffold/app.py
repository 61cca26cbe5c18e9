"""SCAFFOLD inside Flower: Shoal's strategy on the server, Shoal's clients on the nodes. Two nodes, of unequal size.

shoal flower run examples/flower_scaffold --nodes 2      # on Shoal
flwr run examples/flower_scaffold                        # on Flower: its simulation, or a SuperLink with SuperNodes
"""

from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import shoal

STRATEGIES = {"scaffold": shoal.Scaffold(), "fednova": shoal.FedNova()}


def experiment(name: str) -> shoal.Experiment:
    """What ``shoal.Experiment.simulate`` runs as it is."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 5)).astype(np.float32)
    data = shoal.datasets.from_arrays(x, (x[:, 0] > x[:, 1]).astype(np.int64), clients=["a"] * 30 + ["b"] * 60)
    local = shoal.LocalTraining(lr=0.1, batch_size=10, epochs=2)
    strategy = STRATEGIES[name]
    return shoal.Experiment(model="mlp", data=data, strategy=strategy, local=local, rounds=2, cohort=2, seed=5)


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    return shoal.flower.client_app(experiment(str(context.run_config["strategy"])))(message, context)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    e = experiment(str(config["strategy"]))
    strategy = shoal.flower.strategy(e.strategy, seed=e.seed, fraction_evaluate=0.0)
    result = strategy.start(grid, shoal.flower.initial_arrays(e), num_rounds=int(config["rounds"]))
    if config["result"]:
        arrays: dict[str, Any] = {name: array.numpy() for name, array in result.arrays.items()}
        np.savez(str(config["result"]), **arrays)
