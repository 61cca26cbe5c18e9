"""One participant's work: run a task with the client half of a strategy, or evaluate.

The same code serves a simulated client in a worker process and a real one behind gRPC, which is why both give the
same bits.
"""

from __future__ import annotations

import traceback
from dataclasses import replace

import torch
from torch import Tensor

from shoal.client.client import Client, FitTrainer
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named, metric_named
from shoal.client.net import Net, to_numpy
from shoal.client.trainer import LeanTrainer, turn_of
from shoal.protos import seeds
from shoal.protos.errors import ExperimentError, ShoalError
from shoal.protos.messages import Failure, check_update
from shoal.strategies.base import Mine, Sent, Strategy, Update
from shoal.strategies.sums import Carried

__all__ = ["BUFFERS", "Participant", "evaluate", "failure", "kept_back"]

BUFFERS = "/buffers"  # under which a client's state has buffers of its own; no strategy's name begins so


class Participant:
    """Runs tasks for any number of clients, one at a time, on one resident net."""

    def __init__(self, net: Net, strategy: Strategy, local: LocalTraining, seed: int, client: Client | None = None):
        self.net, self._strategy, self._local, self._seed, self._client = net, strategy, local, seed, client

    def place(self, sent: Sent) -> Sent:
        """What was sent, on the net's device; at no cost if it is there."""
        device = self.net.flat.device
        tensors = {name: tensor.to(device) for name, tensor in sent.tensors.items()}
        return Sent(sent.parameters.to(device), tensors, sent.settings)

    def train(
        self, client: str, round: int, shard: Shard, sent: Sent, carried: Carried, mine: Mine | None
    ) -> tuple[Update, Mine]:
        """The update, checked, and the client's next state. What the client's code raises comes through.

        Arguments may lie on any device; results are on the CPU.
        """
        sent, shard = self.place(sent), self._place_shard(shard)
        self._seed_torch(seeds.integer(self._seed, "torch", round, client))
        before, kept = self._before(sent, carried, mine)
        update, after = self._strategy.local(self._trainer(client, round, shard, kept), sent, before)
        update, after = kept_back(self._strategy, update, after, carried)
        check_update(update.map(to_numpy), self.net.layout, self._strategy.reply(sent), client, round)
        return update.map(Tensor.cpu), {name: tensor.cpu() for name, tensor in after.items()}

    def _before(self, sent: Sent, carried: Carried, mine: Mine | None) -> tuple[Mine, Carried]:
        """The client's state before a task, and the buffers and counters to begin with."""
        if mine is None:
            return self._strategy.init_client(sent.parameters), carried
        own = {name: tensor.to(self.net.flat.device) for name, tensor in mine.items()}
        buffers = own.pop(BUFFERS, carried.buffers) if self._strategy.own_buffers else carried.buffers
        return own, Carried(buffers, carried.counters)

    def _place_shard(self, shard: Shard) -> Shard:
        """The examples to train on as the model takes them: token ids stay integers."""
        device, x = self.net.flat.device, shard.x
        return Shard(x.to(device, self.net.dtype if x.is_floating_point() else x.dtype), shard.y.to(device))

    def _seed_torch(self, seed: int) -> None:
        """For dropout. Not ``torch.manual_seed``, which queues a seed for every device there might ever be."""
        torch.default_generator.manual_seed(seed)
        if self.net.flat.is_cuda:
            torch.cuda.default_generators[self.net.flat.device.index].manual_seed(seed)  # not the current device's

    def _trainer(self, client: str, round: int, shard: Shard, carried: Carried) -> LeanTrainer:
        turn = turn_of(self._local, self._seed, client, round, shard)
        if self._client is None:
            return LeanTrainer(self.net, self._local, turn, carried)
        return FitTrainer(self._client, self._strategy, self.net, self._local, turn, carried)

    def evaluate(
        self, client: str, round: int, shard: Shard, sent: Sent, carried: Carried, mine: Mine | None
    ) -> dict[str, float]:
        """Loss and metrics of the client's own model on what its shard holds out; nothing if it holds out nothing.

        A strategy that personalises is measured a second time with the global model, under names as ``global_loss``.
        """
        if shard.held_out is None:
            return {}
        sent, held_out = self.place(sent), self._place_shard(shard.held_out)
        globally = self._measured(sent.parameters, carried, held_out)
        if not self._strategy.personalises:
            return globally
        self._seed_torch(seeds.integer(self._seed, "torch", round, client))
        before, kept = self._before(sent, carried, mine)
        trainer = self._trainer(client, round, self._place_shard(shard), kept)
        measured = self._measured(self._strategy.personal(trainer, sent, before), kept, held_out)
        return measured | {f"global_{name}": value for name, value in globally.items() if name != "examples"}

    def _measured(self, parameters: Tensor, carried: Carried, shard: Shard) -> dict[str, float]:
        self.net.flat.copy_(parameters)
        self.net.restore(carried.buffers, carried.counters)
        return evaluate(self.net, self._local, shard)


def kept_back(strategy: Strategy, update: Update, after: Mine, carried: Carried) -> tuple[Update, Mine]:
    """Where buffers are the client's own they go into its state, and the round's are sent back; also for a block."""
    if not strategy.own_buffers or update.buffers is None:
        return update, after
    rounds = carried.buffers.to(update.buffers.device).expand_as(update.buffers)
    return replace(update, buffers=rounds), {**after, BUFFERS: update.buffers}


def failure(error: BaseException, client: str, round: int) -> Failure:
    """An error as the server is told of it: a sentence, and the traceback where it is the client's own code."""
    if isinstance(error, ShoalError):
        return Failure(client, round, str(error))
    reason = f"client {client!r} raised {type(error).__name__} in round {round}: {error}"
    if str(error).startswith("Expected more than 1 value per channel"):  # PyTorch's words
        reason += "; BatchNorm cannot train on a last batch of one example: local.drop_last = true leaves it out"
    return Failure(client, round, reason, "".join(traceback.format_exception(error)))


@torch.no_grad()
def evaluate(net: Net, local: LocalTraining, shard: Shard, chunk: int = 512) -> dict[str, float]:
    """Mean loss and metrics over a shard, with the values the net holds; ``"examples"`` counts them."""
    net.module.eval()
    loss, metrics = loss_named(local.loss), dict(metric_named(metric) for metric in local.metrics or ())
    sums = dict.fromkeys(["loss", *metrics], 0.0)
    for x, y in zip(torch.split(shard.x, chunk), torch.split(shard.y, chunk), strict=True):
        output = net.module(net.arrange(x.clone()))  # a model may change its input in place
        sums["loss"] += float(loss(output, y)) * len(x)
        for name, metric in metrics.items():
            values = metric(output, y)
            if values.shape != (len(x),):
                raise ExperimentError(
                    f"metric {name!r} gave {list(values.shape)} for {len(x)} examples; it must give one number for each"
                )
            sums[name] += float(values.sum(dtype=torch.float64))
    return {name: total / len(shard) for name, total in sums.items()} | {"examples": float(len(shard))}
