"""A strategy of the app's own: it asks nodes who they are and draws half of them, by name, each round."""

import random
import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.query("who")
def who(message: Message, context: Context) -> Message:
    answer = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"who": answer}), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    w = 0.5 * message.content["arrays"]["w"].numpy() + int(context.node_config["partition-id"])
    metrics = MetricRecord({"num-examples": 1 + int(context.node_config["partition-id"])})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}), reply_to=message)


class Half(FedAvg):
    """FedAvg over a cohort that depends on names alone, not on the ids that nodes happen to have."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.asked: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        ask = [Message(RecordDict(), node, f"{MessageType.QUERY}.who") for node in grid.get_node_ids()]
        names = {reply.content["who"]["partition"]: reply.metadata.src_node_id for reply in grid.send_and_receive(ask)}
        cohort = random.Random(server_round).sample(sorted(names), len(names) // 2)
        self.asked += cohort
        record = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round})})
        return [Message(record, names[partition], MessageType.TRAIN) for partition in cohort]


def everybody(grid: Grid, context: Context) -> list[int]:
    """All nodes, once they are there: Flower's simulation starts the server first."""
    while len(nodes := list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.05)
    return nodes


@server.main()
def main(grid: Grid, context: Context) -> None:
    everybody(grid, context)
    strategy = Half()
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=4)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), result.arrays["w"].numpy(), np.array(strategy.asked))
