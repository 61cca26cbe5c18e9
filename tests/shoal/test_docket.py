"""The same server command goes on with what it has begun, and nothing else does."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

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


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with closing(Docket(tmp_path, TWO, "here:1")), pytest.raises(RunError, match="another server runs these"):
        Docket(tmp_path, TWO, "here:1")


def test_a_folder_that_cannot_hold_runs_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot hold runs"):
        Docket(tmp_path / "runs", TWO, "here:1")
