"""Replies in memory that is lent to the processes that answer: no bit is lost, and nothing is overwritten."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from shoal.flower import run
from shoal.flower.app import GivenApp
from shoal.flower.arrays import Lent, quick_arrays
from shoal.flower.compat import context, identify, name_message
from shoal.flower.records import quick_records
from shoal.flower.turns import Answer, Turn
from shoal.flower.workers import Workers

LARGE = 5000  # numbers of 8 bytes: more than goes with the message


def filled(message: Message, context: Context) -> Message:
    """An array of one value, and a state with twice that; or the process ends while it answers."""
    asked: Any = message.content["asked"]
    if asked["value"] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    array = Array(np.full(asked["size"], asked["value"]))
    context.state["kept"] = ArrayRecord({"w": Array(array.numpy() * 2)})
    return Message(RecordDict({"arrays": ArrayRecord({"w": array})}), reply_to=message)


class Asker:
    """Asks one process, one message at a time."""

    def __init__(self, stage: Workers) -> None:
        self.stage, self._number = stage, 0

    def __call__(self, value: float, size: int = LARGE) -> Answer:
        self._number += 1
        message = Message(RecordDict({"asked": ConfigRecord({"value": value, "size": size})}), 2, "query")
        name_message(message, str(self._number))
        about = context(1, 2, {}, {})
        return self.stage.submit(Turn(message.metadata, about, 0), self.stage.publish(message.content)).result(60)

    def arrays(self, value: float, size: int = LARGE) -> Any:
        return self(value, size).reply.content["arrays"]


@pytest.fixture
def ask() -> Iterator[Asker]:
    app = ClientApp()
    app.query()(filled)
    identify(1)
    with ExitStack() as stack:
        stack.enter_context(quick_arrays())
        stack.enter_context(quick_records())
        stage = stack.enter_context(closing(Workers(GivenApp(None, app), 1, 1)))
        stage.ready()
        yield Asker(stage)


def memory(arrays: Any) -> int:
    """Where a reply's array lies."""
    return int(arrays["w"].__dict__["_memory"].ctypes.data)


def holds(arrays: Any, value: float, size: int = LARGE) -> bool:
    return np.array_equal(arrays["w"].numpy(), np.full(size, value))


def test_memory_is_lent_again_when_a_reply_is_gone(ask: Asker) -> None:
    assert type(ask.arrays(1.0)["w"]) is Array  # nobody knew how large it would be
    first = ask.arrays(2.0)
    at = memory(first)
    assert isinstance(first["w"], Lent) and holds(first, 2.0)
    del first
    assert memory(ask.arrays(3.0)) == at


def test_a_reply_that_is_kept_stays_what_it_was(ask: Asker) -> None:
    ask(0.0)
    kept = [ask.arrays(float(value)) for value in range(1, 6)]

    assert all(holds(arrays, float(value)) for value, arrays in enumerate(kept, 1))
    # All but the last were there when others were asked: they have bytes of their own, and memory was lent again.
    assert [arrays["w"].__dict__["_memory"] is None for arrays in kept] == [True] * 4 + [False]


def test_a_nodes_state_has_bytes_of_its_own(ask: Asker) -> None:
    ask(0.0)
    state: Any = ask(1.0).state
    for value in (2.0, 3.0):
        ask(value)

    assert state["kept"]["w"].__dict__["_memory"] is None and holds(state["kept"], 2.0)


def test_a_reply_that_outgrows_its_memory(ask: Asker) -> None:
    ask(0.0)
    larger = ask.arrays(1.0, 3 * LARGE)
    assert type(larger["w"]) is Array and holds(larger, 1.0, 3 * LARGE)
    assert holds(larger := ask.arrays(2.0, 3 * LARGE), 2.0, 3 * LARGE) and isinstance(larger["w"], Lent)


def test_memory_of_a_process_that_was_killed_is_lent_again(ask: Asker) -> None:
    ask(0.0)
    at = memory(ask.arrays(1.0))
    assert "killed by signal 9" in ask(-1.0).reason
    again = ask.arrays(2.0)
    assert memory(again) == at and holds(again, 2.0)


class Keeping(FedAvg):
    """Keeps every reply's array, and looks at all of them after the last round."""

    def __init__(self, seen: list[bool]) -> None:
        super().__init__(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0)
        self.seen, self.kept = seen, list[tuple[float, Array]]()

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        for reply in replies:
            self.kept.append((float(reply.content["metrics"]["value"]), reply.content["arrays"]["w"]))
        if server_round == 4:
            self.seen.extend(bool((array.numpy() == value).all()) for value, array in self.kept)
        return super().aggregate_train(server_round, replies)


def test_what_a_strategy_keeps_over_rounds_and_after_the_run(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        value = 10.0 * message.content["config"]["server-round"] + context.node_config["partition-id"]  # type: ignore
        metrics = MetricRecord({"num-examples": 1, "value": value})
        arrays = ArrayRecord({"w": Array(np.full(5000, value))})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    seen, strategies, server, client = list[bool](), list[Keeping](), ServerApp(), ClientApp()
    client.train()(train)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategies.append(Keeping(seen))
        strategies[0].start(grid, ArrayRecord({"w": Array(np.zeros(5000))}), 4)

    run((server, client), nodes=3, workers=2, out=tmp_path, progress="none")

    assert seen == [True] * 12
    assert all((array.numpy() == value).all() for value, array in strategies[0].kept)
