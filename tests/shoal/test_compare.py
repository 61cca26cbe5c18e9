"""Comparisons as a user meets them: real worker processes, the folder that they leave, what goes wrong."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import shoal
from shoal import Comparison, Experiment, FedAvg, FedProx, LocalTraining, Run, Scaffold, datasets
from shoal.arms import Arm, parse, read, split, written
from shoal.comparing import _stoppable
from shoal.grid import lay_out
from shoal.protos.errors import ExperimentError, RunError
from shoal.report import _amount
from shoal.tally import Live

Shoal = Callable[..., tuple[int, str, str]]

# --- arms ------------------------------------------------------------------------------------------------------------


def test_arms_are_written_with_colons(folder: Path) -> None:
    mine = parse("mine.py:Mine:part=0.5")

    assert split("fedavg, fedprox:mu=0.1,x:layers=[1,2]") == ["fedavg", "fedprox:mu=0.1", "x:layers=[1,2]"]
    assert parse("fedavg:weighting=uniform") == FedAvg(weighting="uniform")
    assert (type(mine).__name__, mine.part) == ("Mine", 0.5)  # type: ignore[attr-defined]
    assert list(read([FedAvg(), mine])) == ["fedavg", "mine.py:Mine part=0.5"]


def test_labels_hold_what_tells_arms_apart() -> None:
    assert list(read([FedAvg(), FedProx(), Scaffold()])) == ["fedavg", "fedprox", "scaffold"]
    assert list(read([FedProx(0.01), FedProx(0.1)])) == ["fedprox mu=0.01", "fedprox mu=0.1"]
    assert list(read([FedProx(0.1, weighting="uniform")])) == ["fedprox mu=0.1 weighting=uniform"]


@pytest.mark.parametrize("strategy", [FedAvg(weighting="uniform"), FedProx(mu=0.5), Scaffold(server_lr=0.7)])
def test_what_is_written_is_read_again(strategy: shoal.Strategy) -> None:
    assert parse(str(written(Arm(strategy)))) == strategy


# --- a comparison ----------------------------------------------------------------------------------------------------

HOSTILE = "</title><script>alert(1)</script>"


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    rng = np.random.default_rng(1)
    x, clients = rng.normal(size=(80, 3)).astype("float32"), [f"c{i % 8}" for i in range(80)]
    y = (x[:, 0] > x[:, 1]).astype("int64")
    data = datasets.from_arrays(x, y, clients=clients, test=(x[:30], y[:30]))
    local = LocalTraining(lr=0.1, batch_size=2, epochs=2)
    return Experiment(model="linear", data=data, local=local, rounds=12, cohort=3, seed=5, name=HOSTILE)


@pytest.fixture(scope="module")
def made(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two arms under two seeds, on two workers."""
    arms: list[shoal.Strategy | str] = [FedAvg(), "fedprox:mu=0.5"]
    out = tmp_path_factory.mktemp("runs")
    return shoal.compare(experiment, arms, seeds=2, target={"accuracy": 0.6}, out=out, workers=2, progress="none")


def run_of(made: Comparison, arm: str, seed: int) -> Run:
    return Run(made.cells.set_index(["arm", "seed"]).loc[(arm, seed), "path"])


@pytest.mark.slow
def test_the_folder_holds_everything(made: Comparison) -> None:
    kept = {path.name for path in made.path.iterdir() if path.name != ".lock"}

    assert made.path.name == "0001-title-script-alert-1-script--comparison"
    assert kept == {"comparison.toml", "experiment.toml", "report.html", "summary.json", "table.csv", "table.tex"}
    assert {Path(path).parent for path in made.cells["path"]} == {made.path.parent / "cells"}
    assert len(list((made.path.parent / "cells").iterdir())) == len(set(made.cells["path"])) == 4
    assert made.status == "finished" and made.problem == ""
    assert made.description["seeds"] == [5, 6] and made.description["engine"] == "lean"
    assert "command" not in made.description  # the data only exist in Python
    assert "fedprox mu=0.5 × 2 seeds" in repr(Comparison(made.path.parent / "1"))


@pytest.mark.slow
def test_tables(made: Comparison) -> None:
    csv = pd.read_csv(made.path / "table.csv", index_col="strategy")
    cells = made.cells.pivot(index="seed", columns="arm", values="test_accuracy")
    long = made.metrics.query("metric == 'test_accuracy' and round == 12").set_index(["arm", "seed"])["value"]

    assert csv.index.tolist() == made.table.index.tolist() == ["fedavg", "fedprox mu=0.5"]
    assert made.table.loc["fedavg", "mean"] == csv.loc["fedavg", "mean"] == pytest.approx(cells["fedavg"].mean())
    assert csv.loc["fedprox mu=0.5", "difference"] == pytest.approx(
        (cells["fedprox mu=0.5"] - cells["fedavg"]).mean(), abs=1e-12
    )
    assert long["fedavg", 6] == cells.loc[6, "fedavg"]
    assert (made.table["reached"] <= made.table["finished"]).all() and (made.table["target"] == 0.6).all()


@pytest.mark.slow
def test_a_cell_is_the_run_that_the_experiment_gives(made: Comparison, experiment: Experiment, tmp_path: Path) -> None:
    """Bit for bit: weights, and every number but the seconds."""
    alone = replace(experiment, strategy=FedProx(mu=0.5), seed=6).simulate(
        engine="lean", workers=0, out=tmp_path, progress="none"
    )
    cell = run_of(made, "fedprox mu=0.5", 6)

    assert torch.equal(cell.parameters.trainable, alone.parameters.trainable)
    numbers = [run.metrics.drop(columns=["seconds", "train_seconds"]) for run in (cell, alone)]
    pd.testing.assert_frame_equal(*numbers, check_exact=True)


@pytest.mark.slow
def test_the_cells_of_a_seed_are_paired(made: Comparison) -> None:
    """Same initial weights, same clients in every round with the same examples; under another seed others."""
    first, second = (run_of(made, arm, 5) for arm in ("fedavg", "fedprox mu=0.5"))
    other = run_of(made, "fedavg", 6)
    tested, asked = ["test_loss", "test_accuracy"], ["round", "client", "examples", "steps"]

    assert first.metrics.loc[0, tested].tolist() == second.metrics.loc[0, tested].tolist()
    pd.testing.assert_frame_equal(first.clients[asked], second.clients[asked])
    assert first.metrics.loc[0, "test_loss"] != other.metrics.loc[0, "test_loss"]
    assert first.clients["client"].tolist() != other.clients["client"].tolist()
    assert first.metrics.loc[12, "test_loss"] != second.metrics.loc[12, "test_loss"]


class Loads(HTMLParser):
    """The addresses that a page would load, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.tags = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


@pytest.mark.slow
def test_the_report_is_one_file(made: Comparison) -> None:
    text = (made.path / "report.html").read_text()
    page = Loads(text)

    assert page.found == [] and not {"link", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(\s*['\"]?http", text.partition("<script>")[0])
    assert text.count("Plotly.newPlot(") >= 5
    for said in (
        "fedprox mu=0.5",
        "No p-values: with 2 seeds",
        "Accuracy on the test set over rounds",
        "torch ",
        "mu = 0.5",
    ):
        assert said in text, said


@pytest.mark.slow
def test_the_report_escapes_names(made: Comparison) -> None:
    text = (made.path / "report.html").read_text()

    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.slow
def test_plots(made: Comparison) -> None:
    figure = made.plot()
    sent = made.plot("test_loss", against="megabytes")

    assert [line.name for line in figure.data if line.showlegend is None] == ["fedavg", "fedprox mu=0.5"]
    assert sent.data[0].x[-1] == pytest.approx(made.table.loc["fedavg", "megabytes"])
    with pytest.raises(ExperimentError, match=r"there is no axis 'rounds' .*did you mean 'round'"):
        made.plot(against="rounds")


def test_a_live_line(experiment: Experiment) -> None:
    out = io.StringIO()
    live = Live(Console(file=out, force_terminal=True, width=200, highlight=False))
    live.starting(Path("runs/0001-x"), lay_out(experiment, ["fedavg", "scaffold"], 2, workers=2), 0)
    for name in ("fedavg, seed 5", "scaffold, seed 5", "fedavg, seed 6"):
        live.began(name)
    live.ended(
        {
            "scenario": "",
            "arm": "fedavg",
            "seed": 5,
            "status": "finished",
            "seconds": 1.5,
            "last": {"test_accuracy": 0.5},
        }
    )
    live.ended({"scenario": "", "arm": "fedavg", "seed": 6, "status": "failed", "reason": "[sic]", "traceback": ""})
    live.close()
    shown = out.getvalue()

    assert "fedavg · scaffold × seeds 5 to 6: 4 runs of 12 rounds" in shown and "engine lean, on 2 cores" in shown
    assert "cell 1/4  fedavg, seed 5  accuracy 0.5000  1.5 s" in shown
    assert "! fedavg, seed 6 failed: [sic]" in shown
    assert re.search(r"cells 2/4 .* scaffold, seed 5", shown)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_in_plain_lines(command: Shoal) -> None:
    code, out, err = command(
        *("compare", "tiny.toml", "--strategies", "fedavg,scaffold,mine.py:Mine", "--seeds", "1"),
        *("--target", "accuracy=0.99", "rounds=2"),
    )
    kept = Comparison("runs/1")

    assert (code, err) == (0, "")
    assert "fedavg · scaffold · mine.py:Mine × seed 0: 3 runs of 2 rounds" in out
    assert re.search(r"cell 3/3  .*, seed 0  accuracy \d\.\d{4}  \d+\.\d s", out)
    assert re.search(r"scaffold +0\.\d{4} +[+-]0\.\d{4} +", out) and "rounds to 0.99" in out
    assert out.endswith("report  runs/0001-tiny-comparison/report.html\n")
    assert kept.cells["status"].tolist() == ["finished"] * 3
    assert "runs/0001-tiny-comparison  finished" in command("runs")[1]
    repeated = shlex.split(kept.description["command"])
    assert repeated[:3] == ["shoal", "compare", "runs/0001-tiny-comparison/experiment.toml"]
    assert [type(parse(arm)).__name__ for arm in split(repeated[4])] == ["FedAvg", "Scaffold", "Mine"]


@pytest.mark.slow
def test_a_cell_that_fails_is_shown_and_the_others_go_on(command: Shoal) -> None:
    code, out, err = command("compare", "tiny.toml", "--strategies", "fedavg,mine.py:Raises", "--seeds", "2", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    cells = {(event["arm"], event["seed"]): event for event in events if event["event"] == "cell"}
    report = (Path("runs/0001-tiny-comparison") / "report.html").read_text()

    assert code == 2 and "Traceback" not in err
    assert err == "shoal: 2 of 4 cells failed, first 'mine.py:Raises' with seed 0: KeyError: 'no such thing'\n"
    assert [event["event"] for event in events] == ["start", *["cell"] * 4, "end"]
    assert {name: cell["status"] for name, cell in cells.items()} == {
        ("fedavg", 0): "finished", ("fedavg", 1): "finished",
        ("mine.py:Raises", 0): "failed", ("mine.py:Raises", 1): "failed",
    }  # fmt: skip
    assert "in finish" in cells["mine.py:Raises", 0]["traceback"]
    assert events[-1]["status"] == "failed"
    assert [row["finished"] for row in events[-1]["table"]] == [2, 0]
    assert "(0/2 seeds)" in report and "This comparison is failed" in report


@pytest.mark.slow
def test_a_cell_whose_worker_was_lost_is_run_once_more(command: Shoal) -> None:
    arms = "mine.py:DiesOnce,mine.py:Dies,fedavg"
    code, out, err = command("compare", "tiny.toml", "--strategies", arms, "--seeds", "1", "--workers", "1")
    cells = Comparison("runs/1").cells.set_index("arm")

    assert code == 2 and "1 of 3 cells failed, first 'mine.py:Dies' with seed 0" in err
    assert out.count("its worker process was lost (killed by signal 9); running it again") == 2
    assert cells["status"].to_dict() == {"mine.py:DiesOnce": "finished", "mine.py:Dies": "failed", "fedavg": "finished"}
    assert cells.loc["mine.py:Dies", "reason"] == "its worker process was lost twice (killed by signal 9)"


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_finished(folder: Path) -> None:
    """A real process, interrupted in its second cell; the pipe ends only when all workers are gone."""
    words = ["compare", "tiny.toml", "--strategies", "fedavg,fedprox", "--seeds", "3", "--workers", "1", "--json"]
    program = [sys.executable, "-c", "from shoal.cli import main; main()", *words, "rounds=60"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "cell":
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read().splitlines()
    process.stdout.close()
    kept = Comparison("runs/1")

    assert process.wait() == 130
    assert json.loads(rest[-1])["status"] == kept.status == "interrupted"
    assert kept.cells["status"].tolist()[0] == "finished" and kept.cells["status"].tolist()[-1] == "unfinished"
    assert (kept.path / "report.html").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_interrupt(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), _stoppable():
        signal.raise_signal(number)

    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_objects_of_a_notebook_are_compared(tmp_path: Path) -> None:
    """Code read from standard input, as a notebook's cells: nothing can be imported again."""
    code = f"""
        import torch, shoal
        from dataclasses import dataclass
        from shoal.strategies.mean import WeightedMean

        @dataclass(frozen=True)
        class Part(shoal.Strategy):
            part: float = 0.5
            citation = "none"
            def local(self, trainer, sent, mine):
                return trainer.run(sent.parameters), mine
            def contribute(self, state, update, context):
                return WeightedMean().contribute(update)
            def finish(self, state, total, context):
                return {{"parameters": state["parameters"] + self.part * WeightedMean.finish(total)}}

        x, y = torch.randn(60, 4), torch.arange(60) % 3
        data = shoal.datasets.from_arrays(x, y, clients=[str(i % 6) for i in range(60)], test=(x, y))
        made = shoal.Experiment(model=lambda: torch.nn.Linear(4, 3), data=data, rounds=2, cohort=4)
        done = shoal.compare(made, [Part(0.5), Part(1.0)], seeds=1, workers=1, out={str(tmp_path)!r}, progress="none")
        print(done.status, done.table.index.tolist())
    """
    done = subprocess.run([sys.executable, "-"], input=textwrap.dedent(code), capture_output=True, text=True)

    assert done.stdout.strip() == "finished ['Part part=0.5', 'Part part=1.0']", done.stderr


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "fedavgg"], r"there is no 'fedavgg' in strategies \(did you mean 'fedavg'\?\)"),
        (["--strategies", "fedavg,"], r"'' is no strategy; write a name and its arguments"),
        (["--strategies", "mu=1"], r"'mu=1' is no strategy"),
        (["--strategies", "fedavg:=1"], r"'fedavg:=1' is no strategy"),
        (["--strategies", "fedprox:mo=1"], r"unknown key 'strategy\.mo' for 'fedprox'"),
        (["--strategies", "fedprox:mu=big"], r"'strategy\.mu' is 'big'"),
        (["--strategies", "mine.py:Nope"], r"'mine\.py' has no 'Nope'"),
        (["--strategies", "fedavg,fedavg"], r"the arm 'fedavg' is given twice"),
        (["--strategies", "fedprox,fedprox:mu=0.01"], r"the arm 'fedprox' is given twice"),
        (["--strategies", "fedavg,scaffold", "local.momentum=0.9"], r"Scaffold is not valid .*plain SGD"),
        (["--strategies", "fedavg", "--seeds", "0"], r"seeds is 0; it must be"),
        (["--strategies", "fedavg", "--workers", "0"], r"workers is 0; a comparison needs 1"),
        (["--strategies", "fedavg", "--target", "acuracy=0.5"], r"unknown key 'target\.acuracy' \(did you mean"),
        (["--strategies", "fedavg", "--target", "accuracy"], r"--target 'accuracy' is not of the form metric=value"),
        (["--strategies", "fedavg", "--target", "accuracy=high"], r"key 'target.*high"),
        (["--strategies", "fedavg", "strategy.mu=1"], r"strategies are compared; name them with --strategies"),
        (["--strategies", "fedavg", "cohort=7"], r"cohort is 7, but there are only 6 clients"),
        (["--strategies", "fedavg", "data.test_fraction=0.0"], r"there is nothing to compare by"),
        (["--strategies", "fedavg", "evaluation.every=0"], r"there is nothing to compare by"),
        (["--strategies", "fedavg", "--out", "tiny.csv"], r"'tiny\.csv' cannot hold runs"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(command: Shoal, arguments: list[str], message: str) -> None:
    code, _, err = command("compare", "tiny.toml", *arguments)

    assert code == 2
    assert re.fullmatch(rf"shoal: .*{message}.*\n", err), err
    assert not Path("runs").exists()


def test_bad_objects_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    for strategies, message in (
        ([], "there is nothing to compare"),
        ([FedAvg], "is no strategy; give an object"),
        ([FedAvg(), FedAvg()], "'fedavg' is given twice"),
    ):
        with pytest.raises(ExperimentError, match=message):
            shoal.compare(experiment, strategies, out=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match="there is no progress 'loud'"):
        shoal.compare(experiment, [FedAvg()], out=tmp_path, progress="loud")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_no_comparison(experiment: Experiment, tmp_path: Path) -> None:
    run = replace(experiment, rounds=1).simulate(workers=0, out=tmp_path, progress="none")

    with pytest.raises(RunError, match=r"is no comparison; read it with shoal\.Run"):
        Comparison(run.path)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (1234.56, "1234.6"), (3.0, "3"), (0.0876, "0.0876"), (0.08, "0.08")]
)
def test_small_amounts_differ_in_what_is_shown(value: float | None, shown: str) -> None:
    assert _amount(value) == shown
