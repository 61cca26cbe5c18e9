"""Callbacks over a made-up fleet: what they are told, how they end a run, and that a restart changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import BestModel, Callback, EarlyStopping, Experiment, Run, Snapshots, Stop, datasets, resume
from shoal.protos.errors import ExperimentError, RunError
from shoal.server import checkpoints
from shoal.server.callbacks import Start
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Plan, Round


def fed(callback: Callback, values: Sequence[float | None], point: Checkpoint, metric: str = "test_loss") -> int | None:
    """The round in which the callback stops; None if it never does."""
    for number, value in enumerate(values):
        numbers = {} if value is None else {metric: value}
        if isinstance(callback.on_round_end(Round(number, numbers), point), Stop):
            return number
    return None


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > x[:, 1]).long()
    data = datasets.from_arrays(x, y, clients=[str(i % 6) for i in range(60)], test=(x, y))
    return Experiment(model="linear", data=data, rounds=6, cohort=3, checkpoint_every=2)


@pytest.fixture(scope="module")
def point(experiment: Experiment) -> Checkpoint:
    from shoal.compose import Composition

    return Composition(experiment).start()


# --- early stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values", "stopped"),
    [
        ("test_loss", [3.0, 2.0, 2.5, 2.5, 1.0], 3),
        ("test_loss", [3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 5),
        ("test_loss", [3.0, None, None, None, 2.0], None),  # rounds without an evaluation are not waited for
        ("test_loss", [3.0, 1.0, float("nan"), float("nan")], 3),
        ("test_accuracy", [0.1, 0.2, 0.2, 0.2], 3),
        ("test_accuracy", [0.1, 0.2, 0.3, 0.4], None),
    ],
)
def test_patience(metric: str, values: list[float | None], stopped: int | None, point: Checkpoint) -> None:
    assert fed(EarlyStopping(metric, patience=2), values, point, metric) == stopped


def test_a_gain_that_is_too_small_is_none(point: Checkpoint) -> None:
    assert fed(EarlyStopping("test_loss", patience=2, least=0.1), [3.0, 2.95, 2.91], point) == 2
    assert fed(EarlyStopping("test_loss", patience=2, least=0.1), [3.0, 2.95, 2.89], point) is None


def test_what_is_remembered_is_enough(point: Checkpoint) -> None:
    """Through JSON, as a checkpoint keeps it: the second half of the run stops where the whole does."""
    values = [3.0, 2.0, 2.1, 2.2, 2.3]
    first, second = EarlyStopping("test_loss", patience=3), EarlyStopping("test_loss", patience=3)
    fed(first, values[:3], point)
    second.recall(json.loads(json.dumps(first.remember())))

    assert fed(second, values[3:], point) == 1 and fed(EarlyStopping("test_loss", patience=3), values, point) == 4


# --- in real runs ----------------------------------------------------------------------------------------------------


class Notes(Callback):
    """Writes down what it is told, counts rounds across restarts, and does what it was made for in a round."""

    def __init__(self, at: int = 0, does: str = "") -> None:
        self.at, self.does, self.rounds = at, does, 0

    def _note(self, what: str) -> None:
        with Path("notes").open("a") as file:
            file.write(f"{what}\n")

    def on_run_start(self, start: Start) -> None:
        self._note(f"start {start.point.round} {start.plan.rounds} {start.path is not None}")

    def on_round_start(self, number: int, cohort: Sequence[str]) -> None:
        self._note(f"round {number} {len(cohort)}")
        if number == self.at and self.does == "raise" and not Path("raised").exists():
            Path("raised").touch()
            raise KeyError("as planned")

    def on_round_end(self, round: Round, point: Checkpoint) -> Stop | None:
        self.rounds += round.number > 0
        self._note(f"end {round.number} {point.round}")
        return Stop("as planned") if round.number == self.at and self.does == "stop" else None

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._note(f"kept {checkpoint.round}")

    def on_run_end(self, point: Checkpoint) -> None:
        self._note(f"over {point.round} after {self.rounds}")

    def on_exception(self, error: BaseException) -> None:
        self._note(f"{type(error).__name__}")

    def remember(self) -> Mapping[str, Any]:
        return {"rounds": self.rounds}

    def recall(self, kept: Mapping[str, Any]) -> None:
        self.rounds = kept["rounds"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulated(experiment: Experiment, *callbacks: Callback) -> Run:
    return replace(experiment, callbacks=callbacks).simulate(engine="lean", workers=0, progress="none")


def test_a_run_is_told_from_start_to_end(experiment: Experiment, here: Path) -> None:
    simulated(replace(experiment, rounds=3), Notes())

    assert Path("notes").read_text().split("\n")[:-1] == [
        "start 0 3 True", "end 0 0", "round 1 3", "end 1 1", "round 2 3", "end 2 2", "kept 2", "round 3 3", "end 3 3",
        "kept 3", "over 3 after 3",
    ]  # fmt: skip


def test_a_stop_is_an_end_like_another(experiment: Experiment, here: Path) -> None:
    run = simulated(experiment, Notes(3, "stop"))

    assert (run.status, run.summary["rounds"], run.summary["stopped"]) == ("finished", 3, "as planned")
    with pytest.raises(RunError, match=r"was stopped after round 3: as planned; it is finished"):
        resume(run.path, experiment=replace(experiment, callbacks=[Notes(3, "stop")]))


def test_after_an_exception_a_callback_goes_on_where_the_checkpoint_is(experiment: Experiment, here: Path) -> None:
    callbacks = [Notes(4, "raise"), BestModel("test_loss"), EarlyStopping("test_accuracy", patience=3)]
    with pytest.raises(KeyError):
        simulated(experiment, *callbacks)
    notes = Path("notes").read_text()
    resumed = resume("runs/1", experiment=replace(experiment, callbacks=callbacks), progress="none")
    Path("notes").unlink()
    whole = simulated(experiment, *callbacks)

    assert "KeyError" in notes and Path("notes").read_text().endswith(f"over {whole.summary['rounds']} after "
                                                                      f"{whole.summary['rounds']}\n")  # fmt: skip
    assert resumed.summary["last"] == whole.summary["last"] and resumed.summary.get("stopped") == whole.summary.get(
        "stopped"
    )
    assert torch.equal(resumed.parameters.trainable, whole.parameters.trainable)
    assert torch.equal(resumed.best.trainable, whole.best.trainable)


def test_the_best_model_is_the_best_rounds(experiment: Experiment, here: Path) -> None:
    """A learning rate so large that the loss goes up and down: the best round is not the last."""
    wild = replace(experiment, local=replace(experiment.local, lr=30.0), rounds=5)
    run = simulated(wild, BestModel("test_loss"), Snapshots(every=2))
    best = run.summary["best"]["test_loss"]["round"]
    kept = checkpoints.latest(run.path / "best")

    assert kept is not None and kept.round == best < 5
    assert sorted(path.name for path in (run.path / "snapshots").iterdir()) == ["round-00002", "round-00004"]
    shorter = simulated(replace(wild, rounds=max(best, 1)))
    if best:
        assert torch.equal(run.best.trainable, shorter.parameters.trainable)
    with pytest.raises(RunError, match="keeps no best model"):
        _ = shorter.best


def test_a_best_model_of_rounds_that_are_run_again_goes(
    experiment: Experiment, point: Checkpoint, tmp_path: Path
) -> None:
    for round in (3, 7):
        checkpoints.write(tmp_path / "best", replace(point, round=round))
    BestModel("test_loss").on_run_start(Start(Plan(9, 3), replace(point, round=5), tmp_path))

    assert [path.name for path in (tmp_path / "best").iterdir()] == ["round-00003"]


# --- in a file -------------------------------------------------------------------------------------------------------


def test_callbacks_are_written_and_read(experiment: Experiment, here: Path) -> None:
    named = replace(experiment, data=None, callbacks=[EarlyStopping("test_loss", patience=4), Snapshots()])
    Path("e.toml").write_text(named.toml())
    read = Experiment.from_file("e.toml")

    assert read.callbacks == [EarlyStopping("test_loss", patience=4), Snapshots()]
    assert "callbacks" not in experiment.toml()
    changed = Experiment.from_file("e.toml", ['callbacks=[{name="best-model",metric="test_accuracy"}]'])
    assert changed.callbacks == [BestModel("test_accuracy")]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("{name='early-stoping'}", r"there is no 'early-stoping' in callbacks \(did you mean"),
        ("{name='early-stopping'}", r"'callbacks\.0\.metric' is missing"),
        ("{name='early-stopping',metric='test_acc'}", r"'callbacks\.0\.metric' is 'test_acc', which is not measured"),
        ("{name='best-model',metric='clients_loss'}", r"'clients_loss', which is not measured"),
        ("{name='early-stopping',metric='test_loss',patience=0}", r"'callbacks\.0\.patience' is 0"),
        ("{name='shoal.strategies.fedavg:FedAvg'}", r"must be a Callback"),
    ],
)
def test_bad_callbacks_are_one_sentence(callback: str, message: str, here: Path) -> None:
    Path("e.toml").write_text('rounds = 1\ncohort = 1\nmodel = "linear"\n')
    with pytest.raises(ExperimentError, match=message):
        Experiment.from_file("e.toml", [f"callbacks=[{callback}]"])
