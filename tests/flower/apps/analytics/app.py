"""No model at all: histograms are asked for, pushed and pulled by hand."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client, server = ClientApp(), ServerApp()


@client.query()
def query(message: Message, context: Context) -> Message:
    values = np.random.default_rng(int(context.node_config["partition-id"])).normal(size=50)
    counts, _ = np.histogram(values, bins=5, range=(-2, 2))
    return Message(RecordDict({"counts": ArrayRecord({"h": Array(counts)})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    left = set(grid.push_messages([Message(RecordDict(), node, "query") for node in grid.get_node_ids()]))
    total = np.zeros(5, dtype=np.int64)
    while left:
        for reply in grid.pull_messages(left):
            left.discard(reply.metadata.reply_to_message_id)
            total += reply.content["counts"]["h"].numpy()
        time.sleep(0.01)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), total)
