"""The same server command goes on with what it has begun, and nothing else does."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shoal.docket import Docket
from shoal.protos.errors import RunError
from shoal.server.runs import RunFolder

TWO = ["an experiment", "another"]


def begin(out: Path, number: int = 0, texts: list[str] = TWO, listen: str = "here:1", anew: bool = False) -> RunFolder:
    with closing(Docket(out, texts, listen, anew)) as docket:
        return docket.folder(number, "a run")


def end(folder: RunFolder, status: str) -> None:
    folder.write("summary.json", {"status": status})


def test_the_same_command_finds_its_runs(tmp_path: Path) -> None:
    first = begin(tmp_path)
    end(first, "finished")
    second = begin(tmp_path, 1)

    assert [path.name for path in (first.path, second.path)] == ["0001-a-run", "0002-a-run"]
    assert begin(tmp_path).path == first.path
    assert begin(tmp_path, 1).path == second.path


@pytest.mark.parametrize("change", [{"texts": ["an experiment"]}, {"listen": "here:2"}, {"anew": True}])
def test_another_command_begins_its_own(tmp_path: Path, change: dict[str, object]) -> None:
    begin(tmp_path)

    assert begin(tmp_path, **change).path.name == "0002-a-run"  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "name"), [("interrupted", "0001-a-run"), ("finished", "0002-a-run")])
def test_a_command_that_has_finished_begins_anew(tmp_path: Path, status: str, name: str) -> None:
    end(begin(tmp_path, texts=["one"]), status)

    assert begin(tmp_path, texts=["one"]).path.name == name


def test_a_run_whose_folder_was_deleted_begins_anew(tmp_path: Path) -> None:
    begin(tmp_path).path.rmdir()

    assert begin(tmp_path).path.is_dir()


@pytest.mark.parametrize("until", ["the folder is made", "the folder is written down"])
def test_a_folder_that_a_kill_left_empty_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str
) -> None:
    """At the moment before the docket is written, and the one before the announcement goes."""

    class Killed(BaseException):
        pass

    make = RunFolder.create

    def makes_and_dies(*words: Any) -> RunFolder:
        make(*words)
        raise Killed

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as killing:
        if until == "the folder is made":
            killing.setattr(RunFolder, "create", makes_and_dies)
        else:
            killing.setattr(Path, "unlink", dies)
        with pytest.raises(Killed):
            begin(tmp_path)
    assert (tmp_path / "0001-a-run").is_dir()

    assert begin(tmp_path).path.name == "0001-a-run"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["0001-a-run"]
    assert not list(tmp_path.glob(".serving-*.making"))


def test_a_folder_that_another_process_made_under_the_announced_name_stays(tmp_path: Path) -> None:
    with closing(Docket(tmp_path, TWO, "here:1")) as docket:
        docket._announce(tmp_path / "0001-a-run")  # and is killed
    RunFolder.create(tmp_path, "a run").write("experiment.toml", "another's")

    assert begin(tmp_path).path.name == "0002-a-run"
    assert (tmp_path / "0001-a-run" / "experiment.toml").read_text() == "another's"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with closing(Docket(tmp_path, TWO, "here:1")), pytest.raises(RunError, match="another server runs these"):
        Docket(tmp_path, TWO, "here:1")


def test_a_folder_that_cannot_hold_runs_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot hold runs"):
        Docket(tmp_path / "runs", TWO, "here:1")
