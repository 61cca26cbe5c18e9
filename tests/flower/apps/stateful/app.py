"""Clients that keep something: a count, and a model of their own that is half the global one."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    w, partition = message.content["arrays"]["w"].numpy(), int(context.node_config["partition-id"])
    seen = context.state.setdefault("seen", ConfigRecord({"rounds": 0}))
    seen["rounds"] += 1
    own = context.state["own"]["w"].numpy() if "own" in context.state else np.zeros_like(w)
    own = 0.5 * own + 0.5 * w + partition
    context.state["own"] = ArrayRecord({"w": Array(own)})
    metrics = MetricRecord({"num-examples": 1, "rounds": seen["rounds"]})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(own)}), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    metrics = {"num-examples": 1, "rounds": context.state["seen"]["rounds"]}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.ones(3))}), num_rounds=4)
    rounds = [record["rounds"] for record in result.evaluate_metrics_clientapp.values()]
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), result.arrays["w"].numpy(), np.array(rounds))
