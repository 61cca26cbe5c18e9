"""A model that is only measured, by the clients and by the server."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    loss = float(message.content["arrays"]["w"].numpy().sum()) + partition
    return Message(RecordDict({"m": MetricRecord({"num-examples": 1 + partition, "loss": loss})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(fraction_train=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.arange(3.0))}),
        num_rounds=2,
        evaluate_fn=lambda round, arrays: MetricRecord({"round": round}),
    )
    if context.run_config["result"]:
        losses = [record["loss"] for record in result.evaluate_metrics_clientapp.values()]
        np.savez(str(context.run_config["result"]), np.array(losses), np.array(list(result.evaluate_metrics_serverapp)))
