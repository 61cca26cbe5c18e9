"""Everything comes from the run config, whose tables are joined by dots, on the server and on the clients."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    config = context.run_config
    w = message.content["arrays"]["w"].numpy() + float(config["model.scale"]) * len(str(config["text"]))
    w = -w if config["flag"] else w
    metrics = MetricRecord({"num-examples": 1 + int(context.node_config["num-partitions"])})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    initial = ArrayRecord({"w": Array(np.zeros(int(context.run_config["model.width"])))})
    rounds = int(context.run_config["count"])
    result = FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=initial, num_rounds=rounds)
    if context.run_config["result"]:
        np.savez(str(context.run_config["result"]), result.arrays["w"].numpy())
