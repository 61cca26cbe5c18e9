"""``shoal data``: what is said of a split, in a terminal, in a page and to a program."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shoal.cli import main
from shoal.overview import Overview, heat_map, histogram
from shoal.simulations.survey import Survey

Run = Callable[[str], tuple[int, str, str]]
EXPERIMENT = """
name = "tiny"
rounds = 1
cohort = 2
[data]
name = "csv"
path = "all.csv"
label = "kind"
client = "site"
client_test = 0.25
[model]
name = "linear"
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """In a folder with three sites of 4, 8 and 12 rows: only sheep, only goats, both alike."""
    rows = ["a,sheep"] * 4 + ["b,goat"] * 8 + ["c,sheep", "c,goat"] * 6
    (tmp_path / "all.csv").write_text(
        "u,site,kind\n" + "\n".join(f"{n + 0.5},{row}" for n, row in enumerate(rows)) + "\n"
    )
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)

    def typed(words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["shoal", *words.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return typed


def test_a_program_is_told_everything(run: Run) -> None:
    code, out, _ = run("data tiny.toml --json")
    told = json.loads(out)

    assert code == 0
    assert (told["name"], told["population"], told["surveyed"]) == ("tiny", 3, 3)
    assert (told["examples"], told["held_out"], told["test"]) == (18, 6, 0)
    assert told["labels"] == ["goat", "sheep"] and told["test_labels"] is None
    assert [line["client"] for line in told["clients"]] == ["a", "b", "c"]
    assert [line["examples"] for line in told["clients"]] == [3, 6, 9]
    assert [line["held_out"] for line in told["clients"]] == [1, 2, 3]
    assert [line["labels"] for line in told["clients"]][:2] == [[0, 3], [6, 0]]
    assert 0 < told["divergence_p5"] < told["divergence"] < told["divergence_p95"] < 1


def test_a_person_reads_plain_text(run: Run) -> None:
    code, out, _ = run("data tiny.toml data.test_fraction=0.25 seed=3")

    assert code == 0 and "\x1b" not in out
    assert out.startswith("tiny · csv, split by its own clients · seed 3\n  clients   3\n")
    assert "the server tests on 6" in out and "mean Jensen-Shannon divergence" in out
    assert "1 to 2 of 2 a client" in out
    goat, sheep = re.findall(r"^ +(?:goat|sheep)  (.*)$", out, re.MULTILINE)
    assert goat[:2] == " █" and sheep[:2] == "█ " and goat[2] in "░▒▓"


def test_show_may_be_left_out_and_split_is_still_there(run: Run) -> None:
    shown = run("data tiny.toml")

    assert shown == run("data show tiny.toml")
    assert run("data --json tiny.toml")[1].startswith("{")
    assert run("data split tiny.toml --to out")[1].startswith("3 shards of 3 to 9 examples")
    assert "show" in run("data --help")[1] and run("data")[0] == 2


@pytest.mark.slow
def test_a_page_holds_all_it_needs(run: Run) -> None:
    code, out, _ = run("data tiny.toml data.test_fraction=0.25 --html page.html")
    page = Path("page.html").read_text()

    assert code == 0 and "tiny · csv" in out
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Examples a client trains on",
        "Labels of each client, as shares of its examples",
        "How far clients&#39; mixes are from the whole&#39;s",
        "The server&#39;s test set",
    ]
    figures = page.rpartition("<dl>")[2]
    assert figures.count("Plotly.newPlot(") == 4 and "goat" in figures
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", figures)
    assert run("data tiny.toml --html no/page.html")[2] == (
        "shoal: 'no/page.html' cannot be written (No such file or directory); give another file\n"
    )


def test_what_cannot_be_shown_is_one_sentence(run: Run) -> None:
    assert run("data none.toml")[2] == "shoal: there is no experiment file 'none.toml'; give the path of a .toml file\n"
    code, _, err = run("data tiny.toml data.partition.kind=iid data.partition.clients=99")
    assert code == 2 and err.startswith("shoal: Iid(clients=99) needs at least 99 × 1 rows, but there are 24")


def test_numbers_have_no_map(run: Run) -> None:
    out = run("data tiny.toml data.label=u data.features=['u']")[1]

    assert "examples a client" in out and "labels" not in out and "mixes" not in out
    told = json.loads(run("data tiny.toml data.label=u data.features=['u'] --json")[1])
    assert told["clients"][0]["labels"] is None and "divergence" not in told
    assert run("data tiny.toml data.label=u data.features=['u'] --html page.html")[0] == 0
    assert Path("page.html").read_text().count("<h2>") == 1


@pytest.mark.slow
def test_of_a_million_clients_a_thousand_are_looked_at(run: Run) -> None:
    words = "data.partition.kind=resampled data.partition.clients=1000000 data.partition.size=5"
    out = run(f"data tiny.toml {words}")[1]

    assert "clients   1,000,000, of which 1,000 are looked at" in out


def test_histograms_count_every_client() -> None:
    for sizes in ([1, 1, 2, 3], [5] * 4, [1, 10, 100, 1000, 10_000], list(range(1, 40))):
        lines = [re.fullmatch(r" *([\d,]+) to +([\d,]+)  █* ([\d,]+)", line) for line in histogram(np.array(sizes))]
        bins = [tuple(int(part.replace(",", "")) for part in line.groups()) for line in lines if line]
        assert len(bins) == len(lines)
        assert all(sum(low <= size <= high for size in sizes) == count for low, high, count in bins)
        assert sum(count for _, _, count in bins) == len(sizes)


def shown(survey: Survey, labels: list[str], width: int, **options: object) -> str:
    console = Console(file=StringIO(), width=width, **options)  # type: ignore[arg-type]
    for line in heat_map(survey, labels, console):
        console.print(line)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_map_fits_the_terminal() -> None:
    counts = np.eye(60, dtype=np.int64)[np.arange(500) % 60] + np.eye(60, dtype=np.int64)[0]
    survey = Survey([str(n) for n in range(500)], counts.sum(1), counts.sum(1) * 0, counts, 500)
    labels = [f"label {n}" for n in range(60)]
    plain = shown(survey, labels, 100)
    coloured = shown(survey, labels, 100, force_terminal=True, color_system="truecolor")

    assert max(map(len, plain.splitlines()[2:])) <= 100
    assert "every 6th client" in plain and "and 40 labels that are rarer" in plain
    assert "from white to blue" in coloured and "\x1b[48;2;0,0,255m".replace(",", ";") in coloured
    assert "\x1b" not in shown(survey, labels, 60, force_terminal=True, color_system="truecolor", no_color=True)


def test_labels_that_cannot_be_seen_are_quoted() -> None:
    survey = Survey(["a"], np.array([3]), np.array([0]), np.array([[1, 1, 1]]), 1)

    lines = shown(survey, [" ", "\n", "a" * 20], 100).splitlines()[2:]
    assert [line[2:16] for line in lines] == [f"{name:>14}" for name in ("' '", r"'\n'", "aaaaaaaaaaaaa…")]


def test_an_experiment_without_data(tmp_path: Path) -> None:
    (tmp_path / "served.toml").write_text('rounds = 1\ncohort = 1\nmodel = "linear"\n')

    with pytest.raises(Exception, match=r"has no \[data\] to split"):
        Overview.of(tmp_path / "served.toml", [])
