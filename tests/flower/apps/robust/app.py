"""Krum, then the trimmed mean, against a client that lies; two strategies one after the other."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedTrimmedAvg, MultiKrum

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    w = 0.5 * message.content["arrays"]["w"].numpy() + (1000.0 if partition == 2 else 0.01 * partition)
    record = RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "m": MetricRecord({"num-examples": 1})})
    return Message(record, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    krum = MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2, fraction_evaluate=0.0)
    first = krum.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.ones(3))}), num_rounds=2)
    trimmed = FedTrimmedAvg(beta=0.25, fraction_evaluate=0.0)
    second = trimmed.start(grid=grid, initial_arrays=first.arrays, num_rounds=2)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), first.arrays["w"].numpy(), second.arrays["w"].numpy())
