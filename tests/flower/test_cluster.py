"""Apps on a Ray of this machine, whose actors die: the bits, and the failures, are those of worker processes."""

from __future__ import annotations

import gc
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

from shoal.cli import app as command
from shoal.flower import FlowerApp, run
from shoal.flower.app import GivenApp
from shoal.flower.cluster import Cluster
from shoal.flower.compat import context, identify, name_message
from shoal.flower.running import Play as Planned
from shoal.flower.sent import Sent
from shoal.flower.turns import Turn
from shoal.protos.errors import ExperimentError, RunError
from shoal.server.runs import RunFolder
from shoal.simulations.session import Session
from tests.flower.conftest import APPS, Play
from tests.flower.test_apps import EXPECTED
from tests.flower.test_faults import without

# Ray leaves pipes and processes to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.timeout(300)]  # Ray on a busy machine


def test_what_cannot_be() -> None:
    with pytest.raises(ExperimentError, match="there is no engine 'rey' for a Flower app"):
        run(APPS / "averaging", engine="rey")
    with pytest.raises(ExperimentError, match="workers is 0; on a Ray cluster it must be 1 or more"):
        run(APPS / "averaging", engine="ray", workers=0)
    with pytest.raises(RunError, match=r"cannot use a Ray cluster at '127\.0\.0\.1:1'"):
        run(APPS / "averaging", ray_address="127.0.0.1:1")


def test_an_app_on_a_machine_that_does_not_have_it(tmp_path: Path) -> None:
    """Its files come along; what a process that was killed has left there is removed."""
    shutil.copytree(APPS / "averaging", tmp_path / "app")
    packed = pickle.dumps(Sent.of(FlowerApp.read(tmp_path / "app")))
    where = []
    for change in (lambda path: None, lambda path: path.write_text("wrong = 1"), lambda path: path.unlink()):
        change(tmp_path / "app" / "averaging" / "client.py")
        sent: Any = pickle.loads(packed)
        with sent.importable():
            assert isinstance(sent.client_app(), ClientApp)
            import averaging.client  # type: ignore[import-not-found]

            where.append(Path(averaging.client.__file__).parents[1])

    assert where[0] == tmp_path / "app" and where[1] != where[0] != where[2]
    assert not where[1].exists() and not where[2].exists()


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A Ray that this process is connected to, as from a notebook; runs use it and leave it alone."""
    session = Session(None, 2)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session.close()
        gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["legacy", "stateful"])
def test_the_bits_are_those_of_this_process(name: str, play: Play, two_cpus: None) -> None:
    _, expected = play(name)
    done, found = play(name, engine="ray", workers=2)

    assert done.status == "finished"
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    for array, flwrs in zip(found, EXPECTED[name], strict=True):
        np.testing.assert_allclose(array, flwrs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers", "reason"),
    [("raise", 1, ": ValueError: no data today"), ("die", 2, ": its process was lost .+"), ("hang", 2, "late")],
)
def test_the_run_goes_on_without_the_client(how: str, workers: int, reason: str, play: Play, two_cpus: None) -> None:
    """An actor that dies in a turn, or hangs in one, is replaced. Beside one that hangs, others answer in time."""
    reason = " did not answer in time" if reason == "late" else reason
    done, (w,) = play("failing", {"how": how}, engine="ray", workers=workers)
    failed = [3] if how == "hang" else [2, 3]

    assert done.status == "finished"
    assert w == pytest.approx(without(1, failed), rel=1e-12)
    assert list(done.failures["round"]) == failed and set(done.failures.client) == {"1"}
    assert done.failures.reason.str.fullmatch(rf"client '1' \(node \d+\){reason}").all()


def turns(*seconds: float) -> list[tuple[Turn, RecordDict]]:
    """A query each, of nodes that nap."""
    identify(1)
    made = []
    for number, nap in enumerate(seconds):
        message = Message(RecordDict({"c": ConfigRecord({"seconds": nap})}), 2, "query")
        name_message(message, str(number))
        made.append((Turn(message.metadata, context(1, 2, {}, {}), 0), message.content))
    return made


def napping() -> GivenApp:
    def nap(message: Message, context: Context) -> Message:
        time.sleep(float(str(message.content.config_records["c"]["seconds"])))
        return Message(message.content, reply_to=message)

    app = ClientApp()
    app.query()(nap)
    return GivenApp(None, app)


@pytest.mark.slow
def test_actors_that_are_busy_with_what_nobody_wants_are_ended_and_no_others(two_cpus: None) -> None:
    """Two actors: one hangs until it is abandoned, the other's turn is not disturbed by that."""
    with closing(Cluster(napping(), 1, 2, None)) as stage:
        asked = [stage.submit(turn, stage.publish(content)) for turn, content in turns(600.0, 1.0, 600.0, 0.0)]
        asked[1].add_done_callback(lambda answer: stage.abandon([asked[2]]))
        stage.abandon(asked[:1])
        last = asked[3].result(timeout=60)

        assert asked[0].cancelled() and asked[2].cancelled()
        assert not asked[1].result().reason and not last.reason


@pytest.mark.slow
def test_a_stage_that_is_closed_owes_nothing(two_cpus: None) -> None:
    (turn, content), *_ = turns(600.0)
    stage = Cluster(napping(), 1, 1, None)
    with closing(stage):
        published = stage.publish(content)
        asked = [stage.submit(turn, published) for _ in range(2)]
    asked.append(stage.submit(turn, published))

    assert all(future.cancelled() for future in asked)
    assert ray.is_initialized()  # by the fixture


@pytest.mark.slow
def test_a_cluster_that_has_no_cpu_any_more_fails_the_turns(two_cpus: None) -> None:
    """The actor's CPU goes to another job of the cluster as soon as it is lost."""

    def last(message: Message, context: Context) -> Message:
        import os

        os._exit(1)

    app = ClientApp()
    app.query()(last)
    with closing(Cluster(GivenApp(None, app), 1, 1, None)) as stage:
        stage._actors._patience = 0.5  # now that one has started
        holders = [ray.remote(num_cpus=1)(Waiting).remote() for _ in range(2)]
        asked = [stage.submit(turn, stage.publish(content)) for turn, content in turns(0.0, 0.0)]
        reasons = [future.result(timeout=60).reason for future in asked]
        for holder in holders:
            ray.kill(holder)

    assert "its process was lost" in reasons[0]
    assert "had none free for 0.5 s" in reasons[1]


class Waiting:
    """Has a CPU."""


@pytest.mark.slow
def test_an_app_that_actors_cannot_load(two_cpus: None, tmp_path: Path) -> None:
    shutil.copytree(APPS / "stateful", tmp_path / "app")
    (tmp_path / "app" / "pyproject.toml").write_text(
        (APPS / "stateful" / "pyproject.toml").read_text().replace("app:client", "app:clients")
    )
    with pytest.raises(ExperimentError, match=r"'app:clients' .* cannot be loaded: AttributeError"):
        Cluster(FlowerApp.read(tmp_path / "app"), 1, 1, None)


@pytest.mark.slow
def test_the_command_and_what_its_folder_says(two_cpus: None, play: Play, tmp_path: Path) -> None:
    """And the bits of an app in a package."""
    _, expected = play("averaging")
    result, out = tmp_path / "ray.npz", tmp_path / "out"
    given = [str(APPS / "averaging"), f"result={result}", "--nodes", "4", "--engine", "ray", "--workers", "2"]
    shown = CliRunner().invoke(command, ["flower", "run", *given, "--out", str(out)])
    (folder,) = out.iterdir()

    assert shown.exit_code == 0 and "engine Flower apps on a Ray of its own" in shown.output
    with np.load(result) as found:
        assert all(np.array_equal(found[name], array) for name, array in zip(found.files, expected, strict=True))
    for array, flwrs in zip(expected, EXPECTED["averaging"], strict=True):
        np.testing.assert_allclose(array, flwrs, rtol=1e-9, atol=1e-12)
    again = Planned.read(RunFolder.open(folder))
    assert (again.on_ray, again.workers, again.ray_address) == (True, 2, None)
