"""What ``shoal flower client`` and ``shoal flower server`` say to what was typed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import app as command
from shoal.flower.joining import config_of
from shoal.protos.errors import ConnectionRefused, ExperimentError
from shoal.protos.transport import Address
from shoal.server.serving import Serving
from tests.flower.conftest import APPS

AVERAGING = str(APPS / "averaging")


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", {}),
        ("partition-id=3 num-partitions=10", {"partition-id": 3, "num-partitions": 10}),
        (
            "path='a folder/b' name=\"x=y\" on=true rate=0.5",
            {"path": "a folder/b", "name": "x=y", "on": True, "rate": 0.5},
        ),
        ("  name=plain-text  ", {"name": "plain-text"}),
    ],
)
def test_a_node_config_is_read_as_flower_reads_it(text: str, config: Mapping[str, Any]) -> None:
    assert config_of(text) == config


@pytest.mark.parametrize("text", ["partition-id", "a=1 b", "a=[1,2]", "a= 1", "a='x"])
def test_what_is_no_node_config_is_refused(text: str) -> None:
    with pytest.raises(ExperimentError, match="is not of the form 'key=value key=value' from"):
        config_of(text)


def test_a_partition_that_is_no_number_is_refused() -> None:
    with pytest.raises(ExperimentError, match="the partition-id 'one'; it must be a whole number"):
        config_of("partition-id=one")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["client", AVERAGING, "--connect", "nowhere", "--insecure"], "'nowhere' is not of the form HOST:PORT"),
        (
            ["client", AVERAGING, "--connect", "127.0.0.1:1"],
            "give --tls DIR for an encrypted connection, or --insecure",
        ),
        (["client", "none", "--connect", "127.0.0.1:1", "--insecure"], "give the folder of a Flower app"),
        (["server", AVERAGING, "--listen", "127.0.0.1:0"], "give --tls DIR for an encrypted connection, or --insecure"),
        (["server", AVERAGING, "--nodes", "0", "--insecure"], "nodes is 0; an app needs at least one"),
        (["server", AVERAGING, "lrr=1", "--insecure"], "unknown key 'lrr' of the app's config"),
        (["server", AVERAGING, "--lease", "0", "--insecure"], "lease is 0.0; it must be a number of seconds above 0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_begun(words: list[str], error: str, tmp_path: Path) -> None:
    where = ["--state", str(tmp_path)] if words[0] == "client" else ["--out", str(tmp_path / "runs")]
    shown = CliRunner().invoke(command, ["flower", *words, *where])

    assert shown.exception is not None and error in str(shown.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_of_experiments_says_that_it_has_no_app(tmp_path: Path) -> None:
    with closing(Serving(Address.parse("127.0.0.1:0"), None)) as serving:
        words = [
            "flower",
            "client",
            AVERAGING,
            "--connect",
            str(serving.address),
            "--insecure",
            "--state",
            str(tmp_path),
        ]
        shown = CliRunner().invoke(command, words)

    assert isinstance(shown.exception, ConnectionRefused)
    assert "no app of Flower's; connect with 'shoal client'" in str(shown.exception)


@pytest.mark.slow
def test_an_idle_device_needs_neither_flwr_nor_torch() -> None:
    found = "import sys, shoal.flower.joining; print({'flwr', 'torch', 'numpy'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)

    assert "flwr" not in done.stdout and "torch" not in done.stdout
