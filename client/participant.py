"""One participant's work: run a task with the client half of a strategy, or evaluate.

The same code serves a simulated client in a worker process and a real one behind gRPC, which is why both give the
same bits.
"""

from __future__ import annotations

import traceback

import torch

from shoal.client.client import Client, FitTrainer, Task
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named, metric_named
from shoal.client.net import Net, to_numpy
from shoal.client.trainer import LeanTrainer
from shoal.protos import seeds
from shoal.protos.errors import ClientError, ShoalError
from shoal.protos.messages import Spec, check_update
from shoal.strategies.base import Mine, Sent, Strategy, Update
from shoal.strategies.sums import Carried

__all__ = ["Participant", "evaluate"]


class Participant:
    """Runs tasks for any number of clients, one at a time, on one resident net."""

    def __init__(self, net: Net, strategy: Strategy, local: LocalTraining, seed: int, client: Client | None = None):
        self.net, self._strategy, self._local, self._seed, self._client = net, strategy, local, seed, client

    def train(self, task: Task, shard: Shard, sent: Sent, carried: Carried, mine: Mine | None) -> tuple[Update, Mine]:
        """The update and the client's next state; ClientError with the traceback if the client's code raises."""
        try:
            torch.default_generator.manual_seed(seeds.integer(self._seed, "torch", task.round, task.client))
            self.net.load(sent.parameters, carried.buffers, carried.counters)
            before = self._strategy.init_client(sent.parameters) if mine is None else mine
            update, after = self._strategy.local(self._trainer(task, shard), sent, before)
        except ShoalError:
            raise
        except Exception as error:
            raise ClientError(
                f"client {task.client!r} raised {type(error).__name__} in round {task.round}: {error}",
                traceback.format_exc(),
            ) from error
        declared = {name: Spec(self.net.layout.dtype, tuple(tensor.shape)) for name, tensor in sent.tensors.items()}
        check_update(update.map(to_numpy), self.net.layout, declared, task.client, task.round)
        return update, after

    def _trainer(self, task: Task, shard: Shard) -> LeanTrainer:
        local, rng = self._local, seeds.stream(self._seed, "batches", task.round, task.client)
        lr = local.lr * local.lr_decay ** (task.round - 1)
        if self._client is None:
            return LeanTrainer(self.net, local, shard, rng, lr)
        return FitTrainer(self._client, task, self.net, local, shard, rng, lr)

    def evaluate(self, shard: Shard, sent: Sent, carried: Carried, mine: Mine | None) -> dict[str, float]:
        """Loss and metrics of the client's own model on a shard."""
        before = self._strategy.init_client(sent.parameters) if mine is None else mine
        self.net.load(self._strategy.personal(sent, before), carried.buffers, carried.counters)
        return evaluate(self.net, self._local, shard)


@torch.no_grad()
def evaluate(net: Net, local: LocalTraining, shard: Shard, chunk: int = 512) -> dict[str, float]:
    """Mean loss and metrics over a shard, with the values the net holds; ``"examples"`` counts them."""
    net.module.eval()
    loss, metrics = loss_named(local.loss), dict(metric_named(metric) for metric in local.metrics)
    sums = dict.fromkeys(["loss", *metrics], 0.0)
    for x, y in zip(torch.split(shard.x, chunk), torch.split(shard.y, chunk), strict=True):
        output = net.module(x)
        sums["loss"] += float(loss(output, y)) * len(x)
        for name, metric in metrics.items():
            sums[name] += float(metric(output, y).sum(dtype=torch.float64))
    return {name: total / len(shard) for name, total in sums.items()} | {"examples": float(len(shard))}
