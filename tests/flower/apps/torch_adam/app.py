"""A small PyTorch net with batch norm, FedAdam on the server."""

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam
from torch import nn

client = ClientApp()
server = ServerApp()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def data(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


@client.train()
def train(message: Message, context: Context) -> Message:
    model, (x, y) = net(), data(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=float(message.content["config"]["lr"]))
    for rows in torch.split(torch.arange(len(x)), 8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(x), "train_loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model, (x, y) = net(), data(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    accuracy = float((model(x).argmax(1) == y).double().mean())
    metrics = MetricRecord({"num-examples": len(x), "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAdam(eta=0.05).start(
        grid=grid,
        initial_arrays=ArrayRecord(net().state_dict()),
        train_config=ConfigRecord({"lr": float(context.run_config["lr"])}),
        num_rounds=3,
    )
    accuracy = [record["accuracy"] for record in result.evaluate_metrics_clientapp.values()]
    if context.run_config["result"]:
        arrays = [array.numpy() for array in result.arrays.values()]
        np.savez(str(context.run_config["result"]), *arrays, np.array(accuracy))
