"""The command line as a user meets it: exit codes, one-sentence errors, output for people and programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from shoal.cli import main
from shoal.simulations.states import ClientStates

Shoal = Callable[..., tuple[int, str, str]]

EXPERIMENT = """
name = "tiny"
rounds = 2
cohort = 3
[data]
name = "csv"
path = "{path}"
label = "y"
client = "site"
test_fraction = 0.2
[model]
name = "linear"
[local]
lr = 0.1
batch_size = 4
"""

MINE = """
from dataclasses import dataclass, replace
import torch
import shoal
from shoal.strategies.fedavg import FedAvg

class Base(shoal.Strategy):
    citation = "none"
    def local(self, trainer, sent, mine):
        return self.spoil(trainer.run(sent.parameters)), mine
    def contribute(self, state, update, context):
        return FedAvg().contribute(state, update, context)
    def finish(self, state, total, context):
        return FedAvg().finish(state, total, context)
    def spoil(self, update):
        return update

class Negative(Base):
    def spoil(self, update):
        return replace(update, examples=-5.0)

class Shape(Base):
    def spoil(self, update):
        return replace(update, delta=update.delta[:-1])

class Nan(Base):
    def spoil(self, update):
        return replace(update, delta=update.delta * torch.nan)

class Fine(Base):
    pass

CONST = 5

class Raises(shoal.Client):
    def fit(self, work):
        if work.client == "b":
            raise KeyError("column 'age'")

def make_net(shape, classes, width=3):
    return torch.nn.Sequential(torch.nn.Linear(shape[0], width), torch.nn.Linear(width, classes))

def by_row(output, target):
    return torch.nn.functional.cross_entropy(output, target, reduction="none")

def embed(shape, classes):
    return torch.nn.Sequential(torch.nn.EmbeddingBag(9, 3), torch.nn.Linear(3, classes))

def no_net():
    return 7

def wrong_net():
    return torch.nn.Linear(99, 2)
"""


@pytest.fixture
def shoal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shoal:
    """Run a command in a folder with ``tiny.toml``, ``tiny.csv`` and ``mine.py``: exit code, output, errors."""
    rng, rows = np.random.default_rng(0), ["a,b,y,site"]
    for row in range(60):
        x = rng.normal(size=2)
        rows.append(f"{x[0]:.3f},{x[1]:.3f},{int(x[0] > x[1])},{'abcdef'[row % 6]}")
    (tmp_path / "tiny.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "tiny.toml").write_text(EXPERIMENT.format(path="tiny.csv"))
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_a_run_in_plain_lines(shoal: Shoal) -> None:
    code, out, err = shoal("simulate", "tiny.toml", "--workers", "0")

    assert (code, err) == (0, "")
    assert re.search(r"round 1/2  3/3 clients  train_loss \d\.\d{4}  test_loss .*  test_accuracy", out)
    assert "✓ finished after 2 rounds" in out
    assert "run     runs/0001-tiny" in out
    kept = {path.name for path in Path("runs/0001-tiny").iterdir() if path.name != ".lock"}
    assert kept == {
        "checkpoints", "clients.jsonl", "env.json", "experiment.toml", "metrics.jsonl", "summary.json",
    }  # fmt: skip


def test_a_run_for_programs(shoal: Shoal) -> None:
    code, out, _ = shoal("simulate", "tiny.toml", "--workers", "0", "--json")
    events = [json.loads(line) for line in out.splitlines()]

    assert code == 0
    assert [event["event"] for event in events] == ["start", "round", "round", "round", "end"]
    assert events[-1]["status"] == "finished"
    assert events[-1]["last"]["test_accuracy"] == events[-2]["test_accuracy"]


def test_the_kept_experiment_runs_again_to_the_same_numbers(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    shoal("simulate", "tiny.toml", "--workers", "0", "model.name=mine.py:make_net", "model.width=4", "strategy=fedprox")
    kept = Path("runs/0001-tiny/experiment.toml").resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, _, err = shoal("simulate", str(kept), "--workers", "0", "--out", "../runs")

    assert (code, err) == (0, "")
    lines = [Path(f"../runs/000{i}-tiny/clients.jsonl").read_text() for i in (1, 2)]
    assert lines[0] == lines[1]
    assert "mu = 0.01" in kept.read_text()


def test_resume_makes_a_run_longer(shoal: Shoal) -> None:
    shoal("simulate", "tiny.toml", "--workers", "0")
    again = shoal("resume", "runs/0001-tiny")
    code, out, _ = shoal("resume", "runs/1", "--rounds", "4")

    assert again[0] == 2 and "has all its 2 rounds" in again[2]
    assert code == 0 and "✓ finished after 4 rounds" in out
    lines = Path("runs/0001-tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("left", [None, "name = ", "\x00"])
def test_a_run_whose_experiment_is_gone_is_one_clear_sentence(shoal: Shoal, left: str | None) -> None:
    shoal("simulate", "tiny.toml", "--workers", "0")
    kept = Path("runs/0001-tiny/experiment.toml")
    kept.unlink()
    if left is not None:
        kept.write_text(left)
    code, _, err = shoal("resume", "runs/1")

    assert code == 2 and re.fullmatch(r"shoal: .*experiment.toml cannot be read .* start it anew\n", err)


def test_a_run_with_a_client_of_the_users_own_resumes(shoal: Shoal) -> None:
    shoal("simulate", "tiny.toml", "client=mine.py:Raises", "quorum=0.1", "--workers", "0")
    code, out, err = shoal("resume", "runs/1", "--rounds", "3")

    assert (code, err) == (0, "") and "✓ finished after 3 rounds" in out


def test_a_run_is_resumed_by_one_process_at_a_time(shoal: Shoal) -> None:
    from shoal.server.runs import RunFolder

    shoal("simulate", "tiny.toml", "--workers", "0")
    folder = RunFolder(Path("runs/0001-tiny"))
    folder.claim()
    code, _, err = shoal("resume", "runs/1", "--rounds", "4")
    folder.close()

    assert code == 2 and "being written by another process" in err


def test_a_run_that_was_killed_is_listed_as_such(shoal: Shoal) -> None:
    shoal("simulate", "tiny.toml", "--workers", "0")
    Path("runs/0001-tiny/summary.json").write_text('{"status": "running"}')

    assert re.search(r"runs/0001-tiny +killed +2 rounds", shoal("runs")[1])
    assert shoal("resume", "runs/1", "--rounds", "3")[0] == 0


@pytest.mark.slow
def test_a_reader_that_stops_reading_does_not_stop_the_run(shoal: Shoal) -> None:
    command = [sys.executable, "-c", "from shoal.cli import main; main()", "simulate", "tiny.toml", "--workers", "0"]
    process = subprocess.Popen([*command, "rounds=50"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()

    assert process.wait() == 0
    assert json.loads(Path("runs/0001-tiny/summary.json").read_text())["rounds"] == 50


def test_a_traceback_is_shown_once(shoal: Shoal) -> None:
    shown = shoal("simulate", "tiny.toml", "client=mine.py:Raises", "cohort=6", "quorum=0.5", "--workers", "0")[1]

    assert shown.count("client 'b' raised KeyError") == 2
    assert shown.count("Traceback (most recent call last)") == 1


def test_no_test_set_is_no_obstacle(shoal: Shoal) -> None:
    text = Path("tiny.toml").read_text().replace("test_fraction = 0.2\n", "")
    Path("tiny.toml").write_text(text)

    assert shoal("simulate", "tiny.toml", "--workers", "0")[0] == 0


def test_runs_are_listed(shoal: Shoal) -> None:
    assert "there are no runs" in shoal("runs")[1]
    shoal("simulate", "tiny.toml", "--workers", "0")
    listed = shoal("runs", "--json")[1]

    assert "runs/0001-tiny" in shoal("runs")[1]
    assert json.loads(listed)["status"] == "finished"
    shoal("simulate", "tiny.toml", "local.lr=0.25", "--workers", "0")
    assert shoal("runs")[1].splitlines()[1].endswith("local.lr=0.25")


def test_strategies_are_listed_with_their_sources(shoal: Shoal) -> None:
    code, out, _ = shoal("strategies")
    listed = [json.loads(line) for line in shoal("strategies", "--json")[1].splitlines()]

    assert code == 0 and "Karimireddy et al. 2020" in out
    assert {"fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedprox", "scaffold"} <= {
        s["name"] for s in listed
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.toml"], r"there is no experiment file 'nothing\.toml'"),
        (["tiny.csv"], r"'tiny\.csv' is not valid TOML"),
        (["tiny.toml", "round=3"], r"unknown key 'round' \(did you mean 'rounds'\?\)"),
        (["tiny.toml", "rounds=many"], r"key 'rounds' is 'many': input should be a valid integer"),
        (["tiny.toml", "rounds=0"], r"key 'rounds' is 0"),
        (["tiny.toml", "rounds"], r"override 'rounds' is not of the form key=value"),
        (["tiny.toml", "evaluation.evry=2"], r"unknown key 'evaluation\.evry' \(did you mean 'every'\?\)"),
        (["tiny.toml", "strategy=fedavgg"], r"there is no 'fedavgg' in strategies \(did you mean 'fedavg'\?\)"),
        (
            ["tiny.toml", "strategy=fedprox", "strategy.mo=1"],
            r"unknown key 'strategy\.mo' for 'fedprox' \(known: mu, weighting\)",
        ),
        (["tiny.toml", "strategy=fedprox", "strategy.mu=big"], r"'strategy\.mu' is 'big'"),
        (["tiny.toml", "strategy=fedprox", "strategy.mu=-1"], r"'strategy\.mu' is -1"),
        (["tiny.toml", "strategy=mine.py:Nope"], r"'mine\.py' has no 'Nope'"),
        (["tiny.toml", "strategy=other.py:Nope"], r"there is no file 'other\.py'"),
        (["tiny.toml", "local.learning=1"], r"unknown key 'local\.learning'"),
        (["tiny.toml", "local.optimizer=sgdd"], r"'local\.optimizer' is 'sgdd'"),
        (["tiny.toml", "local.lr=-1"], r"'local\.lr' is -1"),
        (["tiny.toml", "local.loss=crossentropy"], r"no 'crossentropy' in losses \(did you mean 'cross-entropy'\?\)"),
        (["tiny.toml", "strategy=scaffold", "local.momentum=0.9"], r"Scaffold is not valid .*plain SGD"),
        (["tiny.toml", "strategy=scaffold", "local.optimizer=adam"], r"Scaffold is not valid .*'adam'"),
        (["tiny.toml", "cohort=7"], r"cohort is 7, but there are only 6 clients"),
        (["tiny.toml", "data.path=no.csv"], r"no such file.*no\.csv"),
        (["tiny.toml", "data.features=a"], r"'data\.features' is 'a': it must be a list, such as \['a', 'b'\]"),
        (["tiny.toml", "data.label=z"], r"'z'.*(did you mean|known)"),
        (["tiny.toml", "data.partition={kind='dirichlt', clients=2, alpha=1.0}"], r"did you mean 'dirichlet'"),
        (["tiny.toml", "data.partition={kind='dirichlet', clients=2}"], r"'data\.partition\.alpha' is missing"),
        (["tiny.toml", "data.partition={kind='iid', clients=1000}"], r"1000.*clients"),
        (["tiny.toml", "model=cnn"], r"model 'cnn' needs images"),
        (["tiny.toml", "model.classes=1"], r"label 1 in row \d+ of the training data is out of range .* 1 outputs"),
        (["tiny.toml", "model=mine.py:no_net"], r"model 'mine\.py:no_net' gives a int, it must be a Module"),
        (["tiny.toml", "model=mine.py:wrong_net"], r"the model does not accept examples of shape \[2\]"),
        (["tiny.toml", "model=mine.py:embed"], r"token ids must stay whole: read the data with dtype = 'int64'"),
        (["tiny.toml", "model=mine.py:CONST"], r"model 'mine\.py:CONST' is no class or function"),
        (["tiny.toml", "model=mlp", "model.hidden=[-1]"], r"model 'mlp' cannot be made with .*hidden=\(-1,\)"),
        (["tiny.toml", "strategy=mine.py:CONST"], r"strategy 'mine\.py:CONST' is no class or function"),
        (["tiny.toml", "strategy=mine.py:Raises"], r"gives a Raises, it must be a Strategy"),
        (
            ["tiny.toml", "strategy=builtins:dict"],
            r"strategy 'builtins:dict' is no class or function|it must be a Strategy",
        ),
        (["tiny.toml", "client=mine.py:Fine"], r"gives a Fine, it must be a Client"),
        (["tiny.toml", "selector=builtins:object"], r"it must be a Selector"),
        (["tiny.toml", "local.loss=:x"], r"cannot import ''"),
        (["tiny.toml", "local.betas=[1.0, 1.0]"], r"'local\.betas' is"),
        (["tiny.toml", "local.lr=inf"], r"'local\.lr' is inf"),
        (["tiny.toml", "over_select=inf"], r"key 'over_select' is inf"),
        (["tiny.toml", "local.loss=mse"], r"loss cannot be computed from an output of shape \[2, 2\].*model\.classes"),
        (["tiny.toml", "local.loss=mine.py:by_row"], r"loss gives \[2\] for 2 examples; it must give one number"),
        (
            ["tiny.toml", "local.metrics=['torch:dist']", "model.classes=1", "local.loss=mse"],
            r"metric 'dist' gives \[\] for 2 examples; it must give one number for each",
        ),
        (["tiny.toml", "device=gpu"], r"device 'gpu' cannot be used"),
        (["tiny.toml", "target.acuracy=0.5"], r"unknown key 'target\.acuracy' \(did you mean 'accuracy'\?\)"),
        (["tiny.toml", "data=3"], r"key 'data' is 3: give a name, or a table"),
        (["tiny.toml", "--out", "tiny.csv"], r"'tiny\.csv' cannot hold runs"),
        (["tiny.toml", "evaluation.clients_every=1"], r"set data\.client_test"),
        (["tiny.toml", "strategy=mine.py:Negative"], r"round 1 has 0 of 3 updates.*examples=-5\.0"),
        (["tiny.toml", "strategy=mine.py:Shape"], r"has delta of float32\[5\], expected float32\[6\]"),
        (["tiny.toml", "local.lr=1e38"], r"the server's model is not finite after round 1 \(tensor '1\.weight'\)"),
        (
            ["tiny.toml", "strategy=mine.py:Nan"],
            r"holds nan in its delta in tensor '1\.weight': training diverged; lower local\.lr",
        ),
        (["tiny.toml", "--engine", "captrued"], r"there is no engine 'captrued' \(did you mean 'captured'\?\)"),
        (["tiny.toml", "--engine", "fused:0"], r"a block has a size as in 'fused:64'"),
        (["tiny.toml", "--engine", "fused", "local.momentum=0.9"], r"engine 'fused' .* the optimizer is not plain SGD"),
        (["tiny.toml", "--workers", "-1"], r"workers is -1"),
    ],
    ids=lambda value: " ".join(value[1:] or value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(shoal: Shoal, arguments: list[str], message: str) -> None:
    workers = [] if "--workers" in arguments else ["--workers", "0"]
    code, _, err = shoal("simulate", *arguments, *workers)
    last = err.strip().splitlines()[-1]

    assert code == 2
    assert last.startswith("shoal: ") and re.search(message, last), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("server tiny.toml --listen 127.0.0.1:0", "give --tls DIR for an encrypted connection"),
        ("server tiny.toml --insecure --listen 0.0.0.0:1", "in plain text beyond this machine"),
        ("server tiny.toml --insecure --listen nowhere", "'nowhere' is not of the form HOST:PORT"),
        ("server tiny.toml --insecure --tls .", "exclude each other"),
        ("server tiny.toml --tls .", "ca.pem' cannot be read"),
        ("server tiny.toml --insecure --wait-for 1", "--wait-for is 1, but a round needs 3 updates"),
        ("server tiny.toml --insecure --lease 0", "lease is 0.0; it must be a number of seconds"),
        ("server tiny.toml missing.toml --insecure", "no experiment file 'missing.toml'"),
        ("server rounds=2 --insecure", "name at least one experiment"),
        ("data split missing.toml --to shards", "no experiment file 'missing.toml'"),
    ],
)
def test_what_cannot_be_served_is_one_sentence_too(shoal: Shoal, arguments: str, message: str) -> None:
    code, _, err = shoal(*arguments.split())

    assert code == 2
    assert err.startswith("shoal: ") and message in err, err
    assert not Path("runs").exists()


def test_what_exists_only_in_python_cannot_be_served(shoal: Shoal) -> None:
    from torch import nn

    from shoal import Experiment, datasets
    from shoal.protos.errors import ExperimentError

    data = datasets.from_csv("tiny.csv", label="y", client="site")
    made = Experiment(model=lambda: nn.Linear(2, 2), data=data, cohort=3)

    with pytest.raises(ExperimentError, match="model exists only in Python, but clients build it by name"):
        made.serve("127.0.0.1:0", insecure=True)


def test_what_is_refused_leaves_no_run_behind(shoal: Shoal) -> None:
    shoal("simulate", "tiny.toml", "cohort=7", "--workers", "0")

    assert not Path("runs").exists()


def test_a_client_that_raises_is_shown_whole(shoal: Shoal) -> None:
    code, out, err = shoal("simulate", "tiny.toml", "client=mine.py:Raises", "cohort=6", "--workers", "0")
    going_on = shoal("simulate", "tiny.toml", "client=mine.py:Raises", "cohort=6", "quorum=0.5", "--workers", "0")

    assert code == 2 and "round 1 has 5 of 6 updates and needs 6" in err
    assert "client 'b' raised KeyError in round 1" in out and "in fit" in out
    assert going_on[0] == 0 and "2 client failures" in going_on[1]


def test_a_users_own_strategy_needs_no_packaging(shoal: Shoal) -> None:
    code, _, err = shoal("simulate", "tiny.toml", "strategy=mine.py:Fine", "--workers", "0")

    assert code == 0, err


def test_a_run_from_python_objects_says_that_it_needs_them(shoal: Shoal) -> None:
    import torch

    from shoal import Experiment, datasets

    data = datasets.from_csv("tiny.csv", label="y", client="site")
    made = Experiment(model=lambda: torch.nn.Linear(2, 2), data=data, rounds=1, cohort=2)
    run = made.simulate(workers=0, progress="none")
    code, _, err = shoal("resume", str(run.path), "--rounds", "2")

    assert code == 2 and "made from Python objects (model)" in err and "experiment=" in err


def test_usage_errors_are_exit_code_2(shoal: Shoal) -> None:
    assert shoal("simulate")[0] == 2
    assert shoal("nonsense")[0] == 2
    assert shoal("--version")[1].startswith("shoal 0.")


def client_states(run: Path) -> dict[str, list[float]]:
    with closing(ClientStates(run / "states.sqlite")) as states:
        states.restore(40)
        found = {client: states.get(client) for client in states.clients()}
    assert len(found) == 6
    return {client: mine["control"].tolist() for client, mine in found.items() if mine is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "engine"), [(signal.SIGINT, "lean"), (signal.SIGTERM, "fused:4")])
def test_an_interrupt_saves_and_resume_ends_with_the_same_bits(
    shoal: Shoal, tmp_path: Path, number: int, engine: str
) -> None:
    """A real process, interrupted in a round; the resumed run ends as an undisturbed one, client states included."""
    many = ("rounds=40", "strategy=scaffold", "checkpoint_every=0", "--engine", engine)
    shoal("simulate", "tiny.toml", *many, "--workers", "0", "--out", "whole")
    command = [sys.executable, "-c", "from shoal.cli import main; main()", "simulate", "tiny.toml", "--json"]
    process = subprocess.Popen(
        [*command, *many, "rounds=100000", "--workers", "1"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("round") == 5:
            os.killpg(process.pid, number)
            break
    rest = process.stdout.read()
    process.stdout.close()

    assert process.wait() == 130
    end = json.loads(rest.splitlines()[-1])
    assert (end["event"], end["status"]) == ("end", "interrupted")
    assert 5 <= end["rounds"] < 40
    code, _, err = shoal("resume", "runs/1", "--rounds", "40")
    assert code == 0, err
    whole, resumed = (next(Path(root).iterdir()) for root in ("whole", "runs"))
    tensors = "checkpoints/round-00040/tensors.safetensors"
    assert (resumed / tensors).read_bytes() == (whole / tensors).read_bytes()
    assert client_states(resumed) == client_states(whole)
