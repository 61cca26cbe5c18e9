import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def target(context: Context) -> np.ndarray:
    return np.arange(4.0) + int(context.node_config["partition-id"])


@app.train()
def train(message: Message, context: Context) -> Message:
    w, aim = message.content["arrays"]["w"].numpy(), target(context)
    w = w - message.content["config"]["lr"] * (w - aim)
    metrics = {"num-examples": 1 + int(context.node_config["partition-id"]), "loss": float(((w - aim) ** 2).mean())}
    return Message(
        RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": MetricRecord(metrics)}), reply_to=message
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    w = message.content["arrays"]["w"].numpy()
    metrics = {"num-examples": 1, "loss": float(((w - target(context)) ** 2).mean())}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
