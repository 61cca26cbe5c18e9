"""Mods of Flower's and of the app's own, around all functions and around one; a lifespan; an action with a name."""

import time
from collections.abc import Iterator

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, message_size_mod
from flwr.serverapp import Grid, ServerApp


def doubling(message: Message, context: Context, call) -> Message:
    message.content["config"]["factor"] = 2 * message.content["config"]["factor"]
    reply = call(message, context)
    reply.content["m"]["by-mod"] = 1
    return reply


client = ClientApp()
server = ServerApp()
alive: list[int] = []


@client.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    alive.append(1)
    yield
    alive.pop()


@client.train("scaled", mods=[doubling, message_size_mod, arrays_size_mod])
def train(message: Message, context: Context) -> Message:
    w = message.content["arrays"]["w"].numpy() * message.content["config"]["factor"]
    metrics = MetricRecord({"num-examples": 1, "alive": len(alive)})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "m": metrics}), reply_to=message)


def everybody(grid: Grid, context: Context) -> list[int]:
    """All nodes, once they are there: Flower's simulation starts the server first."""
    while len(nodes := list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.05)
    return nodes


@server.main()
def main(grid: Grid, context: Context) -> None:
    w, counts = np.arange(1.0, 4.0), []
    for _ in range(2):
        record = RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "config": ConfigRecord({"factor": 1.5})})
        messages = [Message(record, node, "train.scaled") for node in everybody(grid, context)]
        replies = list(grid.send_and_receive(messages))
        w = np.mean([reply.content["arrays"]["w"].numpy() for reply in replies], axis=0)
        counts.append(sum(reply.content["m"]["by-mod"] + reply.content["m"]["alive"] for reply in replies))
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), w, np.array(counts))
