"""What a node does: next to nothing, with a vector; an epoch of SGD, with a net."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    partition, arrays = int(context.node_config["partition-id"]), message.content["arrays"]
    if context.run_config["model"] == "2nn":
        from speed.net import trained

        arrays = ArrayRecord(trained(arrays.to_torch_state_dict(), partition))
    else:
        arrays = ArrayRecord({"w": Array(arrays["w"].numpy() * 0.5 + partition)})
    metrics = MetricRecord({"num-examples": 60, "partition": partition})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    norm = float(np.linalg.norm(message.content["arrays"]["w"].numpy()))
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 60, "norm": norm})}), reply_to=message)
