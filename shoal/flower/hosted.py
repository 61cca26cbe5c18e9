"""Shoal's strategies inside Flower: the server half as a strategy of Flower's message API."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from shoal.client.net import to_numpy
from shoal.flower.vectors import joined, layout_for, record, tensors
from shoal.flower.wire import decode_update, encode_sent
from shoal.protos import seeds
from shoal.protos.errors import ExperimentError, InvalidUpdate, RoundError
from shoal.protos.messages import Update, check_update
from shoal.protos.parameters import Layout, Parameters
from shoal.strategies.base import Context, Sent, State, Strategy
from shoal.strategies.sums import Carried, LeafSum, carry, contribute

__all__ = ["Hosted", "strategy"]

PLAIN = ("averaging", "server optimizer")  # families whose client half is training and nothing else
log = logging.getLogger("flwr")


def strategy(strategy: Strategy, *, model: nn.Module | None = None, seed: int = 0, **options: Any) -> Hosted:
    """A strategy of Shoal's as one of Flower's, for ``strategy.start(grid=…, initial_arrays=…)``.

    Its client half is :func:`shoal.flower.client_app`. FedAvg and the server optimizers, whose client half is plain
    training, also take the replies of any other ClientApp: ``arrays`` and ``num-examples``. ``model`` tells trainable
    weights from buffers and frozen ones; without it PyTorch's names do. Cohorts are drawn from the seed, among nodes
    in the order of their ids. ``options`` are those of Flower's FedAvg (``fraction_train``, ``fraction_evaluate``, …).
    """
    if not isinstance(strategy, Strategy):
        raise ExperimentError(f"{strategy!r} is no strategy of Shoal's; give an object, for example shoal.Scaffold()")
    return Hosted(strategy, model, seed, **options)


class Hosted(FedAvg):
    """See :func:`strategy`. What clients measure is put together as Flower's FedAvg does it.

    What changes from round to round are plain values and arrays, so that a run on Shoal can be resumed.
    """

    def __init__(self, strategy: Strategy, model: nn.Module | None, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self._strategy, self._seed = strategy, seed
        self._layout: Callable[[ArrayRecord], Layout] = partial(layout_for, model=model)
        self._state = dict[str, Any]()  # the strategy's, with arrays for tensors
        self._counted = dict[int, int]()  # for each node the last round in which it was counted
        self._cohort, self._population, self._order = list[int](), 0, list[int]()
        self._before: Parameters[Tensor] | None = None  # the round's model

    # --- training ----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.fraction_train == 0.0:
            return []
        self._before = joined(self._layout(arrays), tensors(arrays))
        if server_round == 1:
            self._counted.clear()
            self._keep(self._strategy.init(self._before.trainable))
        self._cohort = self._select(server_round, grid)
        return self._messages(server_round, config, self._cohort, MessageType.TRAIN)

    def _select(self, server_round: int, grid: Grid) -> list[int]:
        nodes = _connected(grid, self.min_available_nodes)
        count, self._population = max(int(len(nodes) * self.fraction_train), self.min_train_nodes), len(nodes)
        if count > len(nodes):
            raise ExperimentError(f"a round wants {count} nodes, but there are {len(nodes)}; lower min_train_nodes")
        rng = seeds.stream(self._seed, "cohort", server_round)
        self._order = [int(i) for i in rng.choice(len(nodes), size=count, replace=False)]
        return [nodes[i] for i in self._order]

    def _messages(self, number: int, config: ConfigRecord, nodes: Sequence[int], kind: str) -> list[Message]:
        sent, about = self._sent(), {**config, "server-round": number}
        model = record(self._model(sent.parameters).named())
        extra = record(sent.tensors)
        return [
            Message(encode_sent(model, extra, sent.settings, about, self._counted.get(node, 0)), node, kind)
            for node in nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sums in an order of the clients, whatever came first. RoundError if nobody is counted."""
        replies = list(replies)
        if not (replies or self._cohort):
            return None, None
        context, total = Context(server_round, self._population, len(self._cohort)), LeafSum()
        updates = self._updates(server_round, replies)
        for position, (_, update) in enumerate(updates):
            total.add(position, contribute(self._strategy, self._now(), update, context))
        summed = total.total()
        if summed is None:
            raise RoundError(f"round {server_round} has no update that counts; see the log for the reasons")
        before = self._model(self._sent().parameters)
        left = carry(Carried(before.buffers, before.counters), summed)
        self._before = replace(before, buffers=left.buffers, counters=left.counters)
        self._keep(self._strategy.finish(self._now(), summed.terms, replace(context, counted=summed.counted)))
        self._counted.update((node, server_round) for node, _ in updates)
        return record(self._model(self._sent().parameters).named()), _means([update for _, update in updates])

    def _updates(self, number: int, replies: Sequence[Message]) -> list[tuple[int, Update[Tensor]]]:
        """Those that count, with their nodes, in the order of the sum; others are told in the log."""
        found = list[tuple[int, int, Update[Tensor]]]()
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise InvalidUpdate(f"node {node} failed: {reply.error.reason}")
                found.append(self._entry(reply, number))
            except InvalidUpdate as error:
                log.warning("round %d, node %d: %s", number, node, error)
        return [(node, update) for _, node, update in sorted(found, key=lambda entry: entry[:2])]

    def _place(self, client: int) -> int:
        """Where a client stands in the sum: where everybody is asked, as in a simulation with the same seed."""
        everybody = len(self._order) == self._population
        return self._order.index(client) if everybody and client in self._order else client

    def _entry(self, reply: Message, number: int) -> tuple[int, int, Update[Tensor]]:
        """A reply's place in the sum, its node and update; InvalidUpdate if it must not be counted."""
        content, node, before = reply.content, reply.metadata.src_node_id, self._model(self._sent().parameters)
        if "update" in content:
            about: Any = content.config_records["client"]
            client, place, layout = str(about["name"]), self._place(int(about["number"])), about["layout"]
            if layout != before.layout.hash:
                raise ExperimentError(
                    "the clients' model is not that of the initial arrays, or has parts (frozen, buffers) that their "
                    "names do not tell; give shoal.flower.strategy(…, model=…)"
                )
            update = decode_update(content)
        else:
            client, place = str(node), self._cohort.index(node)
            update = self._foreign(content, before)
        declared = self._strategy.reply(self._sent())
        check_update(update, before.layout, declared, client, number)
        return place, node, update.map(torch.from_numpy)

    def _foreign(self, content: RecordDict, before: Parameters[Tensor]) -> Update[np.ndarray]:
        """The update in the reply of a ClientApp that knows nothing of Shoal."""
        name = type(self._strategy).__name__
        if self._strategy.family not in PLAIN:
            raise ExperimentError(f"{name} has a client half of its own; use shoal.flower.client_app(…) with it")
        try:
            after = joined(before.layout, tensors(next(iter(content.array_records.values()))))
            (metrics,) = content.metric_records.values()
            numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
            examples = float(numbers.pop(self.weighted_by_key))
        except (KeyError, StopIteration, ValueError, ExperimentError) as error:
            raise InvalidUpdate(f"the reply is no model with its {self.weighted_by_key!r} ({error})") from error
        buffers, counters = (v if v.numel() else None for v in (after.buffers, after.counters))
        update = Update(after.trainable - before.trainable, examples, 0, 0.0, {}, buffers, counters, numbers)
        return update.map(to_numpy)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's FedAvg says whom; a client's own model may need what the strategy sends beside the global one."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if not self._state:
            return messages
        nodes = [message.metadata.dst_node_id for message in messages]
        return self._messages(server_round, config, nodes, MessageType.EVALUATE)

    # --- state -------------------------------------------------------------------------------------------------------

    def _sent(self) -> Sent:
        return self._strategy.send(self._now())

    def _model(self, parameters: Tensor) -> Parameters[Tensor]:
        assert self._before is not None, "set when the round was configured"
        return replace(self._before, trainable=parameters)

    def _now(self) -> State:
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in self._state.items()
        }

    def _keep(self, state: State) -> None:
        self._state = {name: to_numpy(v) if isinstance(v, Tensor) else v for name, v in state.items()}


def _connected(grid: Grid, least: int) -> list[int]:
    """All nodes, as soon as there are enough of them, in the order of their ids."""
    while len(nodes := sorted(grid.get_node_ids())) < least:
        log.info("waiting for nodes: %d of %d are connected", len(nodes), least)
        time.sleep(1)  # a Grid cannot be waited for
    return nodes


def _means(updates: Sequence[Update[Tensor]]) -> MetricRecord:
    """What the clients have measured, weighted by their examples."""
    sums, weights = dict[str, float](), dict[str, float]()
    for update in updates:
        for name, value in update.metrics.items():
            sums[name] = sums.get(name, 0.0) + value * float(update.examples)
            weights[name] = weights.get(name, 0.0) + float(update.examples)
    return MetricRecord({name: total / weights[name] for name, total in sums.items() if weights[name]})
