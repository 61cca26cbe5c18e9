"""The live display, on a terminal that is made up."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shoal import Experiment, Run, datasets
from shoal.compose import Composition
from shoal.progress import Live, Opening, Plain, display
from shoal.protos.errors import ExperimentError
from shoal.protos.messages import Failure
from shoal.run import summarise
from shoal.server.coordinator import Round
from shoal.server.runs import RunFolder


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def live(out: io.StringIO) -> Live:
    return Live(Console(file=out, force_terminal=True, width=200, highlight=False))


def two_clients() -> Experiment:
    data = datasets.from_arrays([[0.0], [1.0]], [0, 1], clients=["a", "b"])
    return Experiment(model="linear", data=data, rounds=3, cohort=2)


def test_what_a_server_waits_for(live: Live, out: io.StringIO) -> None:
    live.starting(Opening.of(Path("runs/0001-x"), two_clients(), 2, 1234, "clients over gRPC", {}))
    live.waiting(1, 2)
    live.on_answers(1, 1, 2)
    live.close()

    assert "waiting for clients: 1 of 2 are connected" in out.getvalue()
    assert "1/2 answered" in out.getvalue()


def test_a_live_line(live: Live, out: io.StringIO) -> None:
    shards = {
        "size_min": 1,
        "size_max": 9,
        "size_median": 4,
        "classes_min": 1,
        "classes_max": 2,
        "total_variation": 0.5,
    }
    live.starting(Opening.of(Path("runs/0001-x"), two_clients(), 2, 1234, "lean", shards))
    point = Composition(two_clients()).start()
    for number, accuracy in enumerate((0.1, 0.5, 0.9)):
        live.on_round_end(Round(number, {"test_loss": 0.25, "test_accuracy": accuracy}), point)
    live.on_failure(Failure("a", 2, "client 'a' [sic] broke", "Traceback: [red]"))
    live.close()
    shown = out.getvalue()

    assert "shards of 1 to 9 examples, median 4 · 1 to 2 classes, 50 % off the common mix" in shown
    assert "1,234 parameters" in shown and "FedAvg · 2 clients, 2 a round" in shown
    assert "round 2/3" in shown and "test accuracy 0.9" in shown and "▁▅█" in shown
    assert "client 'a' [sic] broke" in shown and "Traceback: [red]" in shown


def test_a_traceback_is_shown_once_and_not_kept(live: Live, out: io.StringIO) -> None:
    failure = Failure("a", 1, "it broke", "Traceback " + "x" * 20_000)
    for _ in range(2):
        live.on_failure(failure)

    assert (out.getvalue().count("it broke"), out.getvalue().count("Traceback")) == (2, 1)
    assert sum(map(sys.getsizeof, live._shown)) < 100


@pytest.mark.parametrize("name", ["[/red]", "\x1b[2J"])
def test_names_that_clients_choose_are_no_commands(live: Live, out: io.StringIO, tmp_path: Path, name: str) -> None:
    """Neither to the display nor to the terminal; training's, and those of their own tests."""
    folder = RunFolder.create(tmp_path, "x")
    folder.write("experiment.toml", "")
    line = {"round": 1, f"clients_{name}": 0.5, f"train_loss{name}": 0.5, "counted": 1.0, "asked": 1.0, "seconds": 1.0}
    folder.write("metrics.jsonl", json.dumps(line) + "\n")
    ended = {"status": "finished", "name": "x", "wall_seconds": 1.0, "memory_mb": 1.0}
    folder.write("summary.json", summarise(folder, {}) | ended)
    numbers = {key: value for key, value in line.items() if key != "round"}
    for show in (live, Plain(live.console)):
        show.starting(Opening.of(Path("runs/0001-x"), two_clients(), 2, 1234, "lean", {}))
        show.on_round_end(Round(1, numbers), Composition(two_clients()).start())
        show.close()
        show.finished(Run(folder.path))

    assert "\x1b[2J" not in out.getvalue()
    assert ("[/red]" in out.getvalue()) == (name == "[/red]")


def test_modes() -> None:
    with pytest.raises(ExperimentError, match="did you mean 'plain'"):
        display("plane")
