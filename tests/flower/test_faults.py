"""Clients that fail, in every way there is: the strategy decides, the run folder says why, no process is poisoned."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

from shoal.cli import app as command
from shoal.flower import run
from shoal.flower.app import GivenApp
from shoal.flower.compat import context, identify, name_message
from shoal.flower.stage import InProcess, Stage
from shoal.flower.turns import Answer, Turn
from shoal.flower.workers import Workers
from shoal.protos.errors import RunError
from tests.flower.conftest import APPS, Play


def without(client: int, rounds: Collection[int]) -> np.ndarray:
    """By hand: three rounds of w/2 + k, weighted by 1 + k; this client fails in these of them."""
    w = np.zeros(2)
    for round in (1, 2, 3):
        cohort = [k for k in range(4) if not (k == client and round in rounds)]
        w = np.sum([(1 + k) * (0.5 * w + k) for k in cohort], axis=0) / sum(1 + k for k in cohort)
    return w


def query(node: Context) -> Turn:
    """A message without a content to this node."""
    message = Message(RecordDict(), node.node_id, "query")
    name_message(message, f"{node.node_id}")
    return Turn(message.metadata, node, 0)


WAYS = [
    ("raise", 0, "ValueError: no data today"),
    ("exit", 0, "SystemExit: 3"),
    ("garbage", 0, "the ClientApp returned a dict, not a Message"),
    ("nan", 0, "array 'w' of the reply's 'arrays' is not finite"),
    pytest.param("raise", 2, "ValueError: no data today", marks=pytest.mark.slow),
    pytest.param("die", 2, "its process was lost .exit code 137", marks=pytest.mark.slow),
    pytest.param("hang", 2, "did not answer in time", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "workers", "reason"), WAYS)
def test_the_run_goes_on_without_the_client(how: str, workers: int, reason: str, play: Play) -> None:
    done, (w,) = play("failing", {"how": how}, workers=workers)
    failed = [3] if how == "hang" else [2, 3]

    assert done.status == "finished"
    assert w == pytest.approx(without(1, failed), rel=1e-12)
    assert list(done.metrics.failed) == [int(round in failed) for round in (1, 2, 3)]
    assert list(done.metrics.counted) == [4 - int(round in failed) for round in (1, 2, 3)]
    assert list(done.failures["round"]) == failed and set(done.failures.client) == {"1"}
    for found in done.failures.reason:
        assert re.search(rf"client '1' \(node \d+\):? {reason}", found)


def test_the_traceback_is_kept(play: Play) -> None:
    done, _ = play("failing")
    events = [json.loads(line) for line in (done.path / "log.jsonl").read_text().splitlines()]

    assert [(event["kind"], event["client"], event["round"]) for event in events] == [
        ("failed", "1", 2),
        ("failed", "1", 3),
    ]
    assert 'raise ValueError("no data today")' in events[0]["traceback"]


def test_a_reply_that_the_strategy_refuses_ends_the_run(play: Play, tmp_path: Any) -> None:
    with pytest.raises(RunError, match="the ServerApp of failing raised"):
        play("failing", {"how": "missing"})
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())

    assert summary["status"] == "failed" and "InconsistentMessageReplies" in summary["problem"]
    assert summary["rounds"] == 1


def test_a_run_that_nobody_answers_has_failed(tmp_path: Any) -> None:
    given = [str(APPS / "failing"), "how=all", "--nodes", "3", "--workers", "0", "--out", str(tmp_path)]
    shown = CliRunner().invoke(command, ["flower", "run", *given])
    (folder,) = tmp_path.iterdir()

    assert isinstance(shown.exception, RunError)  # for which main() exits with 2
    assert "none of the 9 train messages was answered" in str(shown.exception)
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_who_waits_behind_a_client_that_hangs_is_played_by_another_process() -> None:
    """One process. What is abandoned ends with it, and so would what comes next."""

    def nap(message: Message, context: Context) -> Message:
        time.sleep(float(str(message.content.config_records["c"]["seconds"])))
        return Message(message.content, reply_to=message)

    app = ClientApp()
    app.query()(nap)
    about = context(1, 2, {}, {})
    identify(1)
    with closing(Workers(GivenApp(None, app), 1, 1)) as stage:
        stage.ready()
        asked = []
        for number, seconds in enumerate((600.0, 0.0)):
            message = Message(RecordDict({"c": ConfigRecord({"seconds": seconds})}), 2, "query")
            name_message(message, str(number))
            asked.append(stage.submit(Turn(message.metadata, about, 0), stage.publish(message.content)))
        stage.abandon(asked[:1])
        answer = asked[1].result(timeout=60)

    assert asked[0].cancelled() and not answer.reason


@pytest.mark.slow
def test_who_shares_a_call_with_a_client_that_hangs_begins_again() -> None:
    """Turns as short as these go together, to one of two processes."""

    def sleep_at_node_2(message: Message, context: Context) -> Message:
        time.sleep(600.0 if context.node_id == 2 and message.content else 0.0)
        return Message(message.content, reply_to=message)

    app = ClientApp()
    app.query()(sleep_at_node_2)
    identify(1)
    with closing(Workers(GivenApp(None, app), 1, 2)) as stage:
        stage.ready()

        def ask(nodes: Sequence[int], content: RecordDict) -> list[Future[Answer]]:
            published = stage.publish(content)
            with stage.together():
                return [stage.submit(query(context(1, node, {}, {})), published) for node in nodes]

        for node in range(20):
            assert not ask([node], RecordDict())[0].result(timeout=60).reason
        asked = ask(range(10), RecordDict({"c": ConfigRecord()}))
        late = asked.pop(2)
        assert not any(future.result(timeout=60).reason for future in asked)
        stage.abandon([late])
        asked = ask([2, 3], RecordDict())
        assert not any(future.result(timeout=60).reason for future in asked)

    assert late.cancelled()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_a_client_writes_into_its_configs_reaches_no_other_and_does_not_stay(workers: int) -> None:
    """Also not if both are asked in one call."""

    def write_at_node_1(message: Message, context: Context) -> Message:
        found = ConfigRecord({"lr": float(context.run_config["lr"]), "place": int(context.node_config["place"])})
        context.node_config["place"] = 9
        if context.node_id == 1:
            context.run_config["lr"] = 9.0
        return Message(RecordDict({"found": found}), reply_to=message)

    app, shared = ClientApp(), {"lr": 0.5}
    app.query()(write_at_node_1)
    identify(1)
    nodes = [context(1, node, {"place": node}, shared) for node in (1, 2)]

    def ask(stage: Stage) -> list[Answer]:
        with stage.together():
            futures = [stage.submit(query(about), stage.publish(RecordDict())) for about in nodes]
        return [future.result(timeout=60) for future in futures]

    made = Workers(GivenApp(None, app), 1, workers) if workers else InProcess(app)
    with closing(made) as stage:
        if isinstance(stage, Workers):
            stage.ready()
        for _ in range(20):  # turns that are known to be short go together
            first, second = ask(stage)

            assert first.reason == "the ClientApp changed the run config"
            assert dict(second.reply.content["found"]) == {"lr": 0.5, "place": 2}
    assert shared == {"lr": 0.5} and [about.node_config["place"] for about in nodes] == [1, 2]


@pytest.mark.slow
def test_a_process_that_the_run_itself_ends_is_not_told_as_lost() -> None:
    def sleep(message: Message, context: Context) -> Message:
        time.sleep(600)
        return Message(RecordDict(), reply_to=message)

    app = ClientApp()
    app.query()(sleep)
    identify(1)
    stage = Workers(GivenApp(None, app), 1, 1)
    with closing(stage):
        stage.ready()
        asked = stage.submit(query(context(1, 2, {}, {})), stage.publish(RecordDict()))

    assert asked.cancelled()


WANTING = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as Legacy
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()


@server.main()
def main(grid, context):
    FedAvg(min_available_nodes=3).start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(1))}), num_rounds=1)


def components(context):
    initial = ndarrays_to_parameters([np.zeros(1)])
    strategy = Legacy(min_available_clients=3, fraction_evaluate=0.0, initial_parameters=initial)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))


legacy = ServerApp(server_fn=components)
"""


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("server", "wants more than the 2 nodes of this run; .* min_available_nodes"),
        ("legacy", "wants 3 clients, and this run has 2 nodes; .* min_available_clients"),
    ],
)
def test_a_strategy_that_wants_more_nodes_than_there_are_does_not_wait(server: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "wanting.py").write_text(WANTING)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "wanting"\nversion = "1"\n[tool.flwr.app]\npublisher = "us"\n'
        f'[tool.flwr.app.components]\nserverapp = "wanting:{server}"\nclientapp = "wanting:client"\n'
    )
    with pytest.raises(RunError, match=said):
        run(tmp_path, nodes=2, workers=0, out=tmp_path / "runs", progress="none")

    assert re.search(said, json.loads((tmp_path / "runs/0001-wanting/summary.json").read_text())["problem"])
