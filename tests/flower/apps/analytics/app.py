"""No model at all: histograms are asked for, pushed and pulled by hand."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message: Message, context: Context) -> Message:
    values = np.random.default_rng(int(context.node_config["partition-id"])).normal(size=50)
    counts, _ = np.histogram(values, bins=5, range=(-2, 2))
    return Message(RecordDict({"counts": ArrayRecord({"h": Array(counts)})}), reply_to=message)


def everybody(grid: Grid, context: Context) -> list[int]:
    """All nodes, once they are there: Flower's simulation starts the server first."""
    while len(nodes := list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.05)
    return nodes


@server.main()
def main(grid: Grid, context: Context) -> None:
    left = set(grid.push_messages([Message(RecordDict(), node, "query") for node in everybody(grid, context)]))
    total = np.zeros(5, dtype=np.int64)
    while left:
        for reply in grid.pull_messages(left):
            left.discard(reply.metadata.reply_to_message_id)
            total += reply.content["counts"]["h"].numpy()
        time.sleep(0.01)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), total)
