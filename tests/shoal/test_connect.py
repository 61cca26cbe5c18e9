"""What ``shoal client`` and ``shoal data split`` say to what was typed: exit code 2 and one sentence."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import shoal
from shoal.cli import main
from shoal.client.sources import read_shard
from shoal.connect import Request
from shoal.protos.transport import Address
from shoal.server.serving import Serving
from shoal.simulations.datasets import Dataset

if TYPE_CHECKING:
    from tests.shoal.conftest import Start

Shoal = Callable[[str], tuple[int, str, str]]
HERE = "client --connect 127.0.0.1:1 --insecure "
EXPERIMENT = """
name = "tiny"
rounds = 1
cohort = 2
[data]
name = "csv"
path = "all.csv"
label = "y"
client = "site"
client_test = 0.2
[model]
name = "linear"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table, an experiment, a shard, and nothing of this machine's user."""
    rng = np.random.default_rng(0)
    rows = [f"{rng.normal():.4f},{rng.integers(2)},site/{number % 12}" for number in range(120)]
    (tmp_path / "all.csv").write_text("u,y,site\n" + "\n".join(rows) + "\n")
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2), "float32"), y=[0, 1, 0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shoal:
    """``run("client …")``: exit code, output and errors of the command."""

    def call(words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *shlex.split(words)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return call


def clients_of(data: str, *options: str, **more: Any) -> Mapping[str, Mapping[str, Any]]:
    """What this process would host."""
    return Request("127.0.0.1:1", data, options, insecure=True, **more).settings().clients


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards, with slashes in their clients' names."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(12):
        np.savez(folder / f"site%2F{number}.npz", x=np.ones((2, 1), "float32"), y=[0, 1])
    return folder


# --- shoal client -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("client --connect nowhere --insecure --data a.npz", "'nowhere' is not of the form HOST:PORT, for example .*"),
        ("client --connect 127.0.0.1:99999 --insecure --data a.npz", "'127.0.0.1:99999' is not of the form .*"),
        ("client --connect 127.0.0.1:1 --data a.npz", "give --tls DIR for an encrypted connection, or --insecure .*"),
        ("client --connect 10.0.0.1:1 --insecure --data a.npz", "--insecure would carry models in plain text .*"),
        (HERE + "--tls certs --data a.npz", "--tls and --insecure exclude each other; give one of them"),
        ("client --connect 127.0.0.1:1 --tls certs --data a.npz", "'certs/ca.pem' cannot be read .* --tls needs .*"),
        (HERE + "--data b.npz", r"there is no file 'b.npz' \(looked in .*\); correct --data"),
        (HERE + "--data b.csv --id a label=y", r"there is no file 'b.csv' \(looked in .*\); correct --data"),
        (HERE + "--data all.csv label=y", "a client of this data needs a name; give it with --id.*"),
        (HERE + "--data a.npz y=y", "a client of this data needs a name; give it with --id.*"),
        (HERE + "--data image-foldr --id a", r"--data 'image-foldr' .* no reader \(did you mean 'image-folder'\?\)"),
        (
            HERE + "--data tiny.toml --id a",
            r"--data 'tiny.toml' is no file, no folder .* and no reader \(known: adult, csv, .*",
        ),
        (HERE + "--data all.csv --id a label", "override 'label' is not of the form key=value, .*"),
        (HERE + "--data a.npz --workers 0", "--workers is 0; at least one process must train"),
        (HERE + "--data a.npz --workers=-2", "--workers is -2; at least one process must train"),
        (HERE + "--data a.npz --skip 1", "--skip leaves out shards of --simulate; give both or none"),
        (HERE + "--data . --simulate 1 --id a", "--simulate takes the clients' names from the data; leave --id out"),
        (HERE + "--data a.npz --simulate 1", "--simulate needs a folder of shards .*, 'a.npz' is neither"),
        (HERE + "--data none --simulate 1", "--simulate needs a folder of shards .*, 'none' is neither"),
        (HERE + "--data . --simulate 2", "--simulate 2 after --skip 0 asks for more shards than the 1 in '.'.*"),
        (HERE + "--data . --simulate 1 --skip 1", "--simulate 1 after --skip 1 asks for more shards than the 1 .*"),
        (HERE + "--data . --simulate 0", "--simulate 0 after --skip 0 asks .* or for none; make them with .*"),
        (HERE + "--data . --simulate=-1", "--simulate -1 after --skip 0 asks .*"),
        (HERE + "--data . --simulate 1 --skip=-1", "--simulate 1 after --skip -1 asks .*"),
        (HERE + "--data . --simulate 1 label=y", "a folder of shards takes no 'label=y'; leave it out"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(run: Shoal, words: str, sentence: str) -> None:
    code, out, err = run(words)

    assert (code, out) == (2, "")
    assert re.fullmatch(f"shoal: {sentence}\n", err), err


def test_data_may_be_spelled_in_several_ways(place: Path, shards: Path) -> None:
    def spec(data: str, *options: str) -> object:
        return clients_of(data, *options, name="a")["a"]

    (place / "UPPER.CSV").write_text("u,y\n1,0\n")
    (place / "photos").mkdir()

    assert spec("a.npz") == {"path": str(place / "a.npz")}
    assert spec("a.npz", "y=labels") == {"name": "npz", "path": str(place / "a.npz"), "y": "labels"}
    assert spec("UPPER.CSV", "label=y") == {"name": "csv", "path": str(place / "UPPER.CSV"), "label": "y"}
    assert spec("photos", "size=28") == {"name": "image-folder", "path": str(place / "photos"), "size": 28}
    assert spec("my.py:read", "n=3") == {"name": "my.py:read", "n": 3}
    assert spec("csv", "path=all.csv", "label=y") == {"name": "csv", "path": "all.csv", "label": "y"}


def test_hosted_clients_have_the_names_and_files_of_the_shards(shards: Path) -> None:
    clients = clients_of(str(shards), simulate=3, skip=8)

    assert clients == {f"site/{n}": {"path": str(shards / f"site%2F{n}.npz")} for n in (8, 9, 10)}


def test_shards_that_somebody_else_named_are_found(place: Path) -> None:
    (place / "a.npz").rename(place / "ward (2) + icu.npz")
    clients = clients_of(".", simulate=1)

    assert clients == {"ward (2) + icu": {"path": str(place / "ward (2) + icu.npz")}}


@pytest.mark.slow
def test_data_that_cannot_be_read_is_said_before_the_first_call(run: Shoal) -> None:
    code, _, err = run(HERE + "--data all.csv --id a label=yy")

    assert code == 2
    assert re.fullmatch(r"shoal: .*all.csv has no column 'yy' \(did you mean 'y'\?\)\n", err), err


def test_a_state_folder_that_cannot_be_written(run: Shoal, place: Path) -> None:
    code, _, err = run(HERE + "--data a.npz --state a.npz")

    assert code == 2
    assert re.fullmatch(r"shoal: 'a.npz/clients/a' cannot be written \(Not a directory\); set --state\n", err), err


@pytest.mark.slow
def test_a_client_that_waits_is_small_and_leaves_nobody_behind(start: Start, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\ndef net(): return torch.nn.Linear(1, 1)\n")
    with closing(Serving(Address("127.0.0.1", 0), None)) as server:
        words = ["--data", shards / "site%2F0.npz", "--state", "state", "--allow", "mine.py:net"]
        client = start("client", "--connect", server.address, "--insecure", *words)
        client.wait_for("site/0  connected to 127.0.0.1")
        pid = client._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        mapped = Path(f"/proc/{pid}/maps").read_text()
        client.signal(signal.SIGTERM)

        assert client.wait() == 130
    for library in ("libtorch", "pandas", "safetensors", "flwr", "plotly"):
        assert library not in mapped
    assert len(children) == 1
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_client(place: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"]
    reading, writing = os.pipe()
    os.close(reading)
    words = shlex.split(HERE + "--data a.npz --patience 0")
    done = subprocess.run([*command, *words], stdout=writing, stderr=subprocess.PIPE, timeout=60, text=True)
    os.close(writing)

    assert done.returncode == 2
    assert done.stderr.startswith("shoal: nothing answers at 127.0.0.1:1 (TCP: Connection refused); ")


# --- shoal data split -------------------------------------------------------------------------------------------------


def test_split_writes_the_shards_of_a_simulation(run: Shoal, place: Path) -> None:
    code, out, _ = run("data split tiny.toml --to out")
    data = shoal.Experiment.from_file("tiny.toml").data
    assert isinstance(data, Dataset)
    simulated = data.split(0)

    assert code == 0
    assert out.startswith("12 shards of 8 to 8 examples (median 8) in out\none client of them: shoal client ")
    assert len(simulated.clients) == len(list(Path("out").iterdir())) == 12
    for client in simulated.clients:
        expected, read = simulated.shard(client), read_shard(Path("out") / f"{client.replace('/', '%2F')}.npz")
        assert read.x_test is not None and expected.x_test is not None
        assert torch.equal(read.x, expected.x) and torch.equal(read.y, expected.y)
        assert torch.equal(read.x_test, expected.x_test)


def test_split_takes_overrides_and_the_line_it_prints_works(run: Shoal, place: Path) -> None:
    _, out, _ = run("data split tiny.toml data.client_test=0.5 --to 'my shards'")
    line = out.splitlines()[1].partition("shoal ")[2].replace("HOST:PORT", "127.0.0.1:1 --insecure --workers 0")

    assert "of 5 to 5 examples" in out
    assert run(line)[2] == "shoal: --workers is 0; at least one process must train\n"


def test_split_refuses_to_mix_shards(run: Shoal, place: Path) -> None:
    run("data split tiny.toml --to out")
    code, out, err = run("data split tiny.toml --to out")

    assert (code, out) == (2, "")
    assert err == "shoal: 'out' holds 12 shards already; take another folder, or --replace them\n"


def test_split_replaces_shards_and_nothing_else(run: Shoal, place: Path) -> None:
    (place / "out").mkdir()
    for name in ("old.npz", "notes.txt"):
        (place / "out" / name).write_text("")
    code, _, _ = run("data split tiny.toml --to out --replace")
    names = {path.name for path in (place / "out").iterdir()}

    assert code == 0
    assert len(names) == 13
    assert names >= {"notes.txt", "site%2F11.npz"}
    assert "old.npz" not in names


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("tiny.toml --to all.csv", "'all.csv' cannot hold shards (File exists); give another folder"),
        ("tiny.toml --to all.csv/in", "'all.csv/in' cannot hold shards (Not a directory); give another folder"),
        ("none.toml --to out", "there is no experiment file 'none.toml'; give the path of a .toml file"),
    ],
)
def test_split_says_what_cannot_be(run: Shoal, words: str, sentence: str) -> None:
    assert run(f"data split {words}") == (2, "", f"shoal: {sentence}\n")


@pytest.mark.slow
def test_hosting_splits_an_experiment_first(run: Shoal, place: Path) -> None:
    clients = clients_of("tiny.toml", simulate=12)

    assert sorted(clients) == sorted(f"site/{n}" for n in range(12))
    assert len(read_shard(Path(str(clients["site/3"]["path"])))) == 8
    code, _, err = run(HERE + "--data tiny.toml --simulate 2 data.label=yy")
    assert code == 2
    assert err.startswith("shoal: ") and "has no column 'yy'" in err and "shoal: " not in err[7:]
