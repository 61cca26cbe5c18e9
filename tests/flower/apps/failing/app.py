"""Client 1 fails in every round after the first, in one of the ways there are; with ``how = "all"`` everybody does."""

import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    partition, round = int(context.node_config["partition-id"]), message.content["config"]["server-round"]
    w = 0.5 * message.content["arrays"]["w"].numpy() + partition
    metrics = {"num-examples": 1 + partition}
    if context.run_config["how"] == "all":
        raise RuntimeError("out of order")
    if partition == 1 and round > 1:
        how = context.run_config["how"]
        if how == "raise":
            raise ValueError("no data today")
        if how == "exit":
            raise SystemExit(3)
        if how == "die":
            os._exit(137)
        if how == "hang" and round == 3:
            time.sleep(600)
        if how == "garbage":
            return {"arrays": w}
        if how == "missing":
            metrics = {"examples": 3}
        w = np.full_like(w, np.nan) if how == "nan" else w
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "m": MetricRecord(metrics)}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    timeout = 3 if context.run_config["how"] == "hang" else 3600
    strategy = FedAvg(fraction_evaluate=0.0)
    initial = ArrayRecord({"w": Array(np.zeros(2))})
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=3, timeout=timeout)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), result.arrays["w"].numpy())
