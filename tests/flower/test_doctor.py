"""What is said of an app without running it; and of a flwr that is not known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli import app as command
from shoal.flower import check_version
from shoal.flower.doctor import diagnose
from shoal.protos.errors import ExperimentError
from tests.flower.conftest import APPS


def said(path: Path) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in diagnose(path)}


def test_what_the_apps_use() -> None:
    assert said(APPS / "secagg")["SecAggPlusWorkflow: secure aggregation (SecAgg+)"] == "runs"
    assert said(APPS / "secagg")["the mod secaggplus_mod"] == "runs"
    assert said(APPS / "legacy")["the strategy FedAvgM"] == "runs"
    assert "its runs cannot be resumed" in " ".join(what for what, v in said(APPS / "legacy").items() if v == "differs")
    assert said(APPS / "stateful")["state of nodes, kept from message to message and across a resume"] == "runs"
    for path in APPS.glob("*/pyproject.toml"):  # scikit-learn and XGBoost, which two of them use, may be missing
        wrong = [what for what, verdict in said(path.parent).items() if verdict == "not supported"]
        assert all(what.endswith("it is not installed") for what in wrong), wrong


def test_what_is_not_supported(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((APPS / "legacy" / "pyproject.toml").read_text())
    (tmp_path / "app.py").write_text(
        "import flwr as fl\nfrom flwr.serverapp import ServerApp\n"
        "server, client = ServerApp(), None\nfl.server.start_server()\nfl.client.start_client()\n"
    )
    shown = CliRunner().invoke(command, ["flower", "doctor", str(tmp_path)])

    assert shown.exit_code == 2
    assert "✗ start_server: Flower's gRPC server" in shown.output and "(app.py:4)" in shown.output
    assert "≠ ServerApp app:server: Shoal loads it, flwr itself wants 'server = …' at top level" in shown.output
    lines = CliRunner().invoke(command, ["flower", "doctor", str(APPS / "mods"), "--json"]).output.splitlines()
    assert {json.loads(line)["verdict"] for line in lines} == {"runs"}


def app_of(folder: Path, old: str, new: str) -> Path:
    """Of :mod:`legacy`'s files, with a change."""
    shutil.copytree(APPS / "legacy", folder)
    for file in folder.iterdir():
        if file.is_file():
            file.write_text(file.read_text().replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"app:server"', '"app:sever"', "ServerApp app:sever: its module has no 'sever'"),
        ('"app:client"', '"apps:client"', "ClientApp apps:client: there is no module 'apps'"),
        ('"app:client"', '"app.x:client"', "ClientApp app.x:client: there is no module 'app.x'"),
        ("import numpy", "import nummpy", "the package nummpy: it is not installed"),
    ],
)
def test_what_cannot_be_loaded(old: str, new: str, told: str, tmp_path: Path) -> None:
    found = said(app_of(tmp_path / "app", old, new))

    assert found[told] == "not supported"
    assert list(found.values()).count("not supported") == 1


def test_what_may_be_missing(tmp_path: Path) -> None:
    """What a ``try`` expects to fail, what only a function imports, and what is in the folder."""
    folder = app_of(tmp_path / "app", "import numpy", "import task, package.inner\nimport numpy")
    (folder / "package").mkdir()
    (folder / "package" / "inner.py").touch()
    (folder / "task.py").write_text(
        "from . import x\ntry:\n    import nummpy\nexcept ImportError:\n    nummpy = None\ndef f():\n    import panda\n"
    )

    assert "not supported" not in said(folder).values()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"def main(:\n", "invalid syntax"),
        (b"x = '\xff'\n", "utf-8"),
        (b"x = 1\0\n", "null"),
    ],
)
def test_a_file_that_is_no_python_is_told_and_the_others_are_read(content: bytes, why: str, tmp_path: Path) -> None:
    shutil.copytree(APPS / "legacy", tmp_path, dirs_exist_ok=True)
    usual = said(tmp_path)
    (tmp_path / "broken.py").write_bytes(content)
    found = {what: verdict for what, verdict in said(tmp_path).items() if what not in usual}

    assert list(found.values()) == ["not supported"]
    assert next(iter(found)).startswith("broken.py is no Python (") and why in next(iter(found))
    assert usual.items() <= said(tmp_path).items()


def test_an_app_that_is_no_python_is_told_once(tmp_path: Path) -> None:
    shutil.copytree(APPS / "legacy", tmp_path, dirs_exist_ok=True)
    (tmp_path / "app.py").write_text("app = \n")

    assert said(tmp_path) == {"app.py is no Python (invalid syntax)": "not supported"}


def test_a_byte_order_mark_and_a_declared_encoding_are_no_error(tmp_path: Path) -> None:
    shutil.copytree(APPS / "legacy", tmp_path, dirs_exist_ok=True)
    for name in ("pyproject.toml", "app.py"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    (tmp_path / "old.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")

    assert said(tmp_path) == said(APPS / "legacy")


def test_versions_of_flwr() -> None:
    for known in ("1.36.0", "1.41.0", "1.42.0.post1"):
        check_version(known)
    for unknown in ("1.7.0", "1.35.2", "1.43.0", "2.0.0", "main"):
        with pytest.raises(ExperimentError, match=r"flwr .* is not a version .* pip install 'flwr>=1.36,<1.43'"):
            check_version(unknown)
