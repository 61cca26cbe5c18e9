"""Shoal's clients inside Flower: the client half of an experiment as a ClientApp."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from torch import Tensor

from shoal.client.data import Shard
from shoal.client.net import Net, build_module, parameters_of
from shoal.client.participant import Participant
from shoal.experiment import Experiment
from shoal.flower.turns import round_in
from shoal.flower.vectors import joined, record, tensors
from shoal.flower.wire import COUNTED, OURS, decode_sent, encode_update
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Parameters
from shoal.simulations.datasets import Dataset
from shoal.simulations.federated import FederatedData
from shoal.simulations.fleet import one_thread
from shoal.strategies.base import Mine, Strategy, Update
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fedprox import FedProx
from shoal.strategies.sums import Carried

__all__ = ["Member", "client_app", "initial_arrays", "legacy_client_app"]

ROUND = "shoal-round"
SETTLED, STAGED, STAGED_IN = "shoal-settled", "shoal-staged", "shoal-staged-in"


def client_app(experiment: Experiment, *, mods: Any = None) -> ClientApp:
    """The experiment's clients as a ClientApp: a node plays the client whose number is its ``partition-id``.

    With :func:`shoal.flower.strategy` on the server it runs the experiment's algorithm; its training is that of
    ``shoal simulate --engine lean``, to the bit. With a strategy of Flower's it trains as the experiment says and
    answers with its model, as Flower's own examples do. ``mods`` are around its training.
    """
    app, member = ClientApp(), Member(experiment)
    app.train(mods=mods)(member.train)
    app.evaluate()(member.evaluate)
    return app


def initial_arrays(experiment: Experiment) -> Any:
    """The experiment's model before training, as ``strategy.start(initial_arrays=…)`` takes it."""
    member = Member(experiment)
    module = build_module(experiment.make_model(member.data), experiment.seed, experiment.dtype)
    return record(parameters_of(module).named())


def legacy_client_app(experiment: Experiment, *, mods: Any = None) -> ClientApp:
    """The same for strategies of ``flwr.server.strategy``, whose messages are other ones."""
    member = Member(experiment)
    return ClientApp(lambda context: _Legacy(member, context).to_client(), mods=[_remembering, *(mods or ())])


def _remembering(message: Message, context: Context, call: Any) -> Message:
    """The round, which the message names and a NumPyClient is not told."""
    context.state[ROUND] = ConfigRecord({"round": int(message.metadata.group_id or 1)})
    reply: Message = call(message, context)
    return reply


class _Legacy(NumPyClient):
    """One client for one message: what it says in records is said in lists of arrays."""

    def __init__(self, member: Member, context: Context) -> None:
        self._member, self._context = member, context

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        with one_thread():
            found = self._member.trained(self._content(parameters, config), self._context)
        metrics: dict[str, Any] = dict(found["metrics"])
        return found.array_records["arrays"].to_numpy_ndarrays(), int(metrics.pop("num-examples")), metrics

    def evaluate(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        with one_thread():
            found = self._member.measured(self._content(parameters, config), self._context)
        metrics: dict[str, Any] = dict(found["metrics"])
        return float(metrics.pop("loss")), int(metrics.pop("num-examples")), metrics

    def _content(self, parameters: list[np.ndarray], config: dict[str, Any]) -> RecordDict:
        names = [entry.name for entry in self._member.participant.net.layout.entries]
        arrays = ArrayRecord({name: Array(array) for name, array in zip(names, parameters, strict=True)})
        about = {"server-round": self._context.state[ROUND]["round"], **config}
        return RecordDict({"arrays": arrays, "config": ConfigRecord(about)})


class Member:
    """Plays any client of an experiment. Data and model are made when they are needed, in each process."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def __getstate__(self) -> dict[str, Any]:
        return {"experiment": self.experiment}

    @cached_property
    def data(self) -> FederatedData:
        data = self.experiment.data
        if data is None:
            raise ExperimentError("key 'data' is missing; a ClientApp needs it")
        return data.split(self.experiment.seed) if isinstance(data, Dataset) else data

    @cached_property
    def participant(self) -> Participant:
        e = self.experiment
        net = Net(build_module(e.make_model(self.data), e.seed, e.dtype), e.device)
        return self._playing(net, e.strategy)

    def _playing(self, net: Net, strategy: Strategy) -> Participant:
        e = self.experiment
        return Participant(net, strategy, e.local, e.seed, e.make_client())

    def _participant(self, content: RecordDict) -> Participant:
        """With FedProx's client half where Flower's FedProx asks for it."""
        config = content.config_records.get("config", ConfigRecord())
        mu = config.get("proximal-mu", config.get("proximal_mu", 0.0))
        if isinstance(self.experiment.strategy, FedAvg) and isinstance(mu, int | float) and mu > 0:
            return self._playing(self.participant.net, FedProx(mu=float(mu)))
        return self.participant

    def train(self, message: Message, context: Context) -> Message:
        with one_thread():  # as in Shoal's own engines, for the same bits
            return Message(self.trained(message.content, context), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        with one_thread():
            return Message(self.measured(message.content, context), reply_to=message)

    def trained(self, content: RecordDict, context: Context) -> RecordDict:
        """The reply to a message that asks to train."""
        client, shard = self._client(context)
        number = round_in(content) or 1
        model = self._model(content)
        mine = _settled(context, content)
        carried = Carried(model.buffers, model.counters)
        try:
            sent = decode_sent(content, model.trainable)
            participant = self._participant(content)
            update, after = participant.train(client, number, shard, sent, carried, mine)
        except KeyError as error:
            if OURS in content:
                raise
            name = type(self.experiment.strategy).__name__
            raise ExperimentError(
                f"{name} needs its server half ({error} was not sent): shoal.flower.strategy"
            ) from error
        _stage(context, after, number)
        if OURS in content:
            return encode_update(update, client, int(context.node_config["partition-id"]), model.layout.hash)
        _settle(context)  # a foreign server tells nobody who was counted
        return _plain(model, update)

    def measured(self, content: RecordDict, context: Context) -> RecordDict:
        """The reply to one that asks to evaluate."""
        client, shard = self._client(context)
        model, mine = self._model(content), _settled(context, content)
        carried, sent = Carried(model.buffers, model.counters), decode_sent(content, model.trainable)
        found = self.participant.evaluate(client, round_in(content) or 1, shard, sent, carried, mine)
        if not found:
            raise ExperimentError(f"client {client!r} holds no test examples; set data.client_test = 0.2")
        metrics = {name: value for name, value in found.items() if name != "examples"}
        record = MetricRecord({**metrics, "num-examples": found["examples"]})
        return RecordDict({"metrics": record})

    def _client(self, context: Context) -> tuple[str, Shard]:
        clients, number = self.data.clients, context.node_config.get("partition-id")
        if not isinstance(number, int) or not 0 <= number < len(clients):
            raise ExperimentError(
                f"this node's partition-id is {number!r}, the experiment has clients 0 to {len(clients) - 1}; start as "
                f"many nodes as there are clients, each with its own --node-config 'partition-id=…'"
            )
        return clients[number], self.data.shard(clients[number])

    def _model(self, content: RecordDict) -> Parameters[Tensor]:
        return joined(self.participant.net.layout, tensors(next(iter(content.array_records.values()))))


def _plain(model: Parameters[Tensor], update: Update) -> RecordDict:
    """The model after training and how many examples it saw."""
    buffers, counters = update.buffers, update.counters
    after = Parameters(
        model.layout,
        model.trainable + update.delta,
        model.buffers if buffers is None else buffers,
        model.counters if counters is None else counters,
        frozen=model.frozen,
    )
    metrics = MetricRecord({**update.metrics, "num-examples": float(update.examples)})
    return RecordDict({"arrays": record(after.named()), "metrics": metrics})


# --- a client's own state, which takes effect only when its update was counted ----------------------------------------


def _stage(context: Context, mine: Mapping[str, Tensor], number: int) -> None:
    context.state[STAGED] = record(mine)
    context.state[STAGED_IN] = ConfigRecord({"round": number})


def _settle(context: Context) -> None:
    context.state[SETTLED] = context.state.pop(STAGED)
    del context.state[STAGED_IN]


def _settled(context: Context, content: RecordDict) -> Mine | None:
    """The state to begin with: that of the round which the server says was the last to count."""
    counted = content.config_records["config"].get(COUNTED, 0) if "config" in content.config_records else 0
    if STAGED in context.state:
        if context.state[STAGED_IN]["round"] == counted:
            _settle(context)
        else:
            del context.state[STAGED], context.state[STAGED_IN]
    return tensors(context.state.array_records[SETTLED]) if SETTLED in context.state else None
