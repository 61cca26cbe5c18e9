"""Differential privacy by Flower's own wrapper and mod; without noise, so that two runs can be compared."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

client = ClientApp()
server = ServerApp()


@client.train(mods=[fixedclipping_mod])
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    moved = {
        name: Array(array.numpy() + 1.0 + int(context.node_config["partition-id"])) for name, array in arrays.items()
    }
    return Message(
        RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 5})}), reply_to=message
    )


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = DifferentialPrivacyClientSideFixedClipping(
        FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=2.0, num_sampled_clients=4
    )
    initial = ArrayRecord({"a": Array(np.zeros((2, 3))), "b": Array(np.ones(2))})
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=3)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), *[array.numpy() for array in result.arrays.values()])
