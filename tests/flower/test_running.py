"""A run of a Flower app: its folder, its config, its seed, its end, and going on with it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shoal import resume
from shoal.cli import app as command
from shoal.flower import FlowerApp, run
from shoal.flower.keep import read_arrays
from shoal.progress import Silent
from shoal.protos.errors import ExperimentError, RunError
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Round
from tests.flower.conftest import APPS, Play


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder(play: Play) -> None:
    done, (w,) = play("averaging")
    rounds = done.metrics

    assert list(rounds.index) == [0, 1, 2, 3]
    assert list(rounds.counted[1:]) == [4, 4, 4] and rounds.bytes_up[3] == rounds.bytes_down[3] / 2
    assert rounds.test_norm[3] == pytest.approx(np.linalg.norm(w))
    assert rounds.train_loss[1] == pytest.approx(
        np.average([((np.arange(4.0) + k) ** 2).mean() / 4 for k in range(4)], weights=[1, 2, 3, 4])
    )
    asked = done.clients
    assert len(asked) == 3 * 4 * 2 and set(asked.kind) == {"train", "evaluate"}
    assert list(asked[(asked["round"] == 2) & (asked.kind == "train")].client) == ["0", "1", "2", "3"]
    assert read_arrays(done.path)["w"] == pytest.approx(w)
    assert "ROUND 3/3" in (done.path / "flower.log").read_text()


def test_rounds_of_the_legacy_server(play: Play) -> None:
    done, (weights, bias) = play("legacy")
    rounds = done.metrics

    assert list(rounds.index) == [0, 1, 2, 3] and list(rounds.counted[1:]) == [4, 4, 4]
    assert rounds.test_bias[3] == pytest.approx(float(bias))
    assert {"train_mse", "clients_mae", "clients_loss", "test_loss"} <= set(rounds.columns)
    assert read_arrays(done.path)["0"] == pytest.approx(weights)
    with pytest.raises(RunError, match="has finished"):
        resume(done.path, progress="none")


def test_what_the_legacy_server_adds_up_has_one_order(play: Play) -> None:
    first, second = (play("legacy")[1] for _ in range(2))

    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_rounds_of_an_app_that_names_none(play: Play) -> None:
    done, _ = play("mods")

    assert list(done.metrics.counted) == [4, 4]
    assert set(done.clients.alive) == {1}


def test_one_app_with_two_strategies_counts_on(play: Play) -> None:
    assert list(play("robust")[0].metrics.index) == [1, 2, 3, 4]


def test_overrides(play: Play, tmp_path: Path) -> None:
    _, (w,) = play("configured", {"text": "a=b", "flag": True, "model.scale": 2, "count": 1})

    assert w == pytest.approx([-6.0, -6.0, -6.0])
    with pytest.raises(
        ExperimentError, match=r"unknown key 'model.scal' of the app's config .did you mean 'model.scale'"
    ):
        run(APPS / "configured", ["model.scal=2"], out=tmp_path)
    with pytest.raises(ExperimentError, match="not of the form key=value"):
        run(APPS / "configured", ["model.scale"], out=tmp_path)
    for wrong in ("model.scale=big", "count=1 text=b", "flag=yes"):
        with pytest.raises(ExperimentError, match=r"of the app's config is .* is text; several changes"):
            run(APPS / "configured", [wrong], out=tmp_path)
    assert FlowerApp.read(APPS / "configured", ['count="1"']).config["count"] == "1"
    assert FlowerApp.read(APPS / "configured", {"count": "many"}).config["count"] == "many"
    assert not list(tmp_path.glob("0*"))


def test_an_app_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="give the folder of a Flower app"):
        run(tmp_path)
    shutil.copytree(APPS / "stateful", tmp_path / "app")
    project = tmp_path / "app" / "pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace("app:server", "app:client"))
    with pytest.raises(ExperimentError, match=r"'app:client' .* is a ClientApp, not a ServerApp"):
        run(tmp_path / "app", workers=0, out=tmp_path / "runs")
    project.write_text(text.replace("app:server", "app:serve"))
    with pytest.raises(ExperimentError, match="cannot be loaded: AttributeError"):
        run(tmp_path / "app", workers=0, out=tmp_path / "runs")
    project.write_text(text.replace("[tool.flwr", "[tool.other"))
    with pytest.raises(ExperimentError, match="describes no Flower app"):
        run(tmp_path / "app")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import nummpy", r"ModuleNotFoundError: No module named 'nummpy' \(parts/task.py:2\)$"),
        ("x = undefined + 1", r"NameError: name 'undefined' is not defined \(parts/task.py:2\)$"),
        ("def f(:", r"SyntaxError: .* \(parts/task.py:2\)$"),
        ("import json; json.loads('{')", r"JSONDecodeError: .* \(parts/task.py:2\)$"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_told_with_the_place(line: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "app"
    shutil.copytree(APPS / "stateful", folder)
    (folder / "parts").mkdir()
    (folder / "parts" / "task.py").write_text(f"# what is wrong\n{line}\n")
    app = folder / "app.py"
    app.write_text(app.read_text().replace("import numpy", "import parts.task\nimport numpy", 1))
    with pytest.raises(ExperimentError, match=said):
        run(folder, workers=0, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_apps_files_are_known_wherever_its_folder_lies(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden" / "app"
    shutil.copytree(APPS / "stateful", folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "other.py").touch()

    assert FlowerApp.read(folder).files() == FlowerApp.read(APPS / "stateful").files()
    assert "app.py" in FlowerApp.read(folder).files()


DRAWING = """
import random

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message: Message, context: Context) -> Message:
    drawn = MetricRecord({"drawn": [random.random(), float(np.random.random())]})
    return Message(RecordDict({"m": drawn}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    nodes = random.sample(list(grid.get_node_ids()), 2)
    replies = [*grid.send_and_receive([Message(RecordDict(), n, "query") for n in nodes])]
    replies += grid.send_and_receive([Message(RecordDict(), n, "query") for n in reversed(nodes)])
    np.savez(context.run_config["result"], [nodes[0] % 2**53, *[x for r in replies for x in r.content["m"]["drawn"]]])
"""


@pytest.mark.slow
def test_a_seed_makes_cohorts_and_draws_whatever_the_workers(tmp_path: Path) -> None:
    shutil.copytree(APPS / "stateful", tmp_path / "app")
    (tmp_path / "app" / "app.py").write_text(DRAWING)
    found = []
    for seed, workers in ((5, 0), (5, 2), (6, 0)):
        result = tmp_path / f"{seed}-{workers}.npz"
        run(
            tmp_path / "app",
            {"result": str(result)},
            nodes=6,
            seed=seed,
            workers=workers,
            out=tmp_path,
            progress="none",
        )
        found.append(np.load(result)["arr_0"])

    assert np.array_equal(found[0], found[1])
    assert not np.isin(found[0], found[2]).any()
    assert len(set(found[0])) == len(found[0])  # a node draws something else each time


def test_the_callers_generators_are_left_alone(play: Play) -> None:
    np.random.seed(1)
    expected = np.random.random(), np.random.random()
    np.random.seed(1)
    first = np.random.random()
    play("averaging")

    assert (first, np.random.random()) == expected


class Interrupting(Silent):
    """Somebody presses Ctrl-C when a round is shown."""

    def __init__(self, when: int = 2) -> None:
        self._when = when

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        if round.number == self._when:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "name", ["averaging", "stateful", pytest.param("torch_adam", marks=pytest.mark.slow), "private", "cohorts"]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    name: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = play(name)
    with monkeypatch.context() as patch:
        patch.setattr("shoal.flower.running.display", lambda mode: Interrupting())
        interrupted, nothing = play(name)
    assert interrupted.status == "interrupted" and not nothing
    done = resume(interrupted.path, progress="none")
    with np.load(tmp_path / "result.npz") as arrays:
        found = [arrays[key] for key in arrays.files]

    assert done.status == "finished"
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert done.metrics.index.is_unique and done.metrics.index[-1] == len(done.metrics) - (0 in done.metrics.index)
    assert any(line["kind"] == "resumed" and line["round"] == 1 for line in lines(done.path / "log.jsonl"))


@pytest.mark.parametrize(
    ("name", "why"),
    [("legacy", "legacy server, whose loop begins with round 1"), ("robust", "one strategy after another")],
)
def test_an_app_that_cannot_go_on_says_so(name: str, why: str, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shoal.flower.running.display", lambda mode: Interrupting(3))
        interrupted, _ = play(name)

    assert why in interrupted.summary["no_resume"]
    with pytest.raises(RunError, match=why):
        resume(interrupted.path, progress="none")


def test_a_strategy_that_keeps_what_cannot_be_written(tmp_path: Path) -> None:
    shutil.copytree(APPS / "cohorts", tmp_path / "app")
    code = (tmp_path / "app" / "app.py").read_text()
    (tmp_path / "app" / "app.py").write_text(
        code.replace("self.asked: list[int] = []", "self.asked = []; self.x = {1, 2}")
    )
    done = run(tmp_path / "app", nodes=4, workers=0, out=tmp_path, progress="none")

    assert done.summary["no_resume"] == "its strategy keeps what Shoal cannot write down: attributes.x is a set"


def test_the_command(tmp_path: Path) -> None:
    given = [
        "flower",
        "run",
        str(APPS / "averaging"),
        "lr=1.0",
        "--nodes",
        "3",
        "--workers",
        "0",
        "--out",
        str(tmp_path),
    ]
    shown = CliRunner().invoke(command, given)
    assert shown.exit_code == 0
    assert "round 3/3  3/3 clients" in shown.output and "finished after 3 rounds" in shown.output
    events = [json.loads(line) for line in CliRunner().invoke(command, [*given, "--json"]).stdout.splitlines()]

    assert [event["event"] for event in events] == ["start", *["round"] * 4, "end"]
    assert events[-1]["status"] == "finished"
    assert "finished" in CliRunner().invoke(command, ["runs", "--out", str(tmp_path)]).output


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """A real process: exit code 130, and the run goes on where it was."""
    program = [sys.executable, "-c", "from shoal.cli import main; main()"]
    given = [
        "flower",
        "run",
        str(APPS / "averaging"),
        "num-server-rounds=5000",
        "--workers",
        "0",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen([*program, *given], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("round 3/5000"):
            assert line, "it ended by itself"
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())

    assert process.returncode == 130
    assert summary["status"] == "interrupted" and f"shoal resume {folder}" in rest
    assert 3 <= json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["round"] < 5000
