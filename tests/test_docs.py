"""What the README and the docs say is true of the code."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

from shoal.client.local import LocalTraining
from shoal.protos.experiment import ExperimentFile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.slow
def test_the_readmes_python_runs_as_printed(tmp_path: Path) -> None:
    code = "\n".join(blocks("python")) + "\nrun = Halfway(part=0.25); print(run)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout and "Halfway(part=0.25)" in done.stdout
    assert (tmp_path / "fashion.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("words", ["data split", "--simulate 50", "shoal compare"])
def test_the_readmes_shell_runs_as_printed(words: str, tmp_path: Path) -> None:
    (block,) = (block for block in blocks("sh") if words in block)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(
        ["sh", "-e"], input=block.replace("8470", port), cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "✓ finished" in done.stdout or "report" in done.stdout, done.stdout + done.stderr
    statuses = [json.loads(path.read_text())["status"] for path in tmp_path.glob("tour/*/summary.json")]
    assert statuses == ["finished"]


@pytest.mark.slow
def test_the_readmes_own_strategy_runs_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(blocks("python")[-1])
    command = (
        "import sys; sys.argv = ['shoal', 'simulate', 'e.toml', 'strategy=my.py:Halfway', 'rounds=1', 'model=linear']"
    )
    (tmp_path / "e.toml").write_text((ROOT / "examples" / "fashion.toml").read_text())
    code = f"{command}\nfrom shoal.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "Halfway" in done.stdout


@pytest.mark.slow
def test_the_tutorials_strategy_runs_everywhere(tmp_path: Path) -> None:
    """As printed, from its file, in blocks and in worker processes; and it is as short as it says."""
    (code,) = blocks("python", (ROOT / "docs" / "own-strategy.md").read_text())
    (tmp_path / "anchored.py").write_text(code)
    (tmp_path / "e.toml").write_text((ROOT / "examples" / "fashion.toml").read_text())
    shoal = [str(Path(sys.executable).parent / "shoal")]
    small = ["rounds=2", "cohort=4", "model=linear", "evaluation.clients_every=0", "--engine", "fused:4"]
    command = [*shoal, "simulate", "e.toml", "strategy=anchored.py:Anchored", "strategy.mu=0.05", *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert len([line for line in code.partition("class ")[2].splitlines() if line.strip()]) <= 30


@pytest.mark.slow
def test_the_code_of_ones_own_that_a_page_shows_runs(tmp_path: Path) -> None:
    (code,) = blocks("python", (ROOT / "docs" / "experiment.md").read_text())
    (tmp_path / "my.py").write_text(code.replace("[3.0, 1.0]", "[3.0] + 9 * [1.0]"))  # the example here has ten classes
    own = ["local.loss=my.py:weighted", 'local.metrics=["accuracy", "my.py:top2"]', "selector=my.py:Worst"]
    small = ["rounds=3", "cohort=4", "model=linear", "selector.share=0.5", "evaluation.clients_every=0"]
    command = [sys.executable, "-m", "shoal", "simulate", ROOT / "examples" / "fashion.toml", *own, *small]
    done = subprocess.run([*map(str, command), "--workers", "0"], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "test_accuracy" in done.stdout and "test_top2" in done.stdout


def test_the_readmes_experiment_is_the_example() -> None:
    shown = tomllib.loads(blocks("toml")[0])
    example = tomllib.loads((ROOT / "examples" / "fashion.toml").read_text())

    assert shown == {key: example[key] for key in shown}


def test_every_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "experiment.md").read_text()

    for key in ExperimentFile.model_fields:
        assert f"`{key}" in text, key
    for field in fields(LocalTraining):
        assert f"`{field.name}`" in text, field.name


def test_every_data_set_and_partitioner_is_documented() -> None:
    from shoal.protos import registry

    pages = [(ROOT / "docs" / name).read_text() for name in ("experiment.md", "data.md")]
    for name in registry.names("shoal.datasets"):
        assert f"`{name}`" in pages[0], name
    for name in registry.names("shoal.partitioners"):
        assert all(f"| `{name}` |" in page for page in pages), name
        for key in signature(registry.load("shoal.partitioners", name)).parameters:
            assert all(f"`{key}`" in row for page in pages for row in page.splitlines() if f"| `{name}` |" in row), key
    for path in (ROOT / "examples" / "data").glob("*.toml"):
        assert re.search(rf"`shoal simulate examples/data/{path.name}[` ]", pages[1]), path


def test_every_strategy_is_in_the_changelog() -> None:
    from shoal.protos import registry

    text = (ROOT / "CHANGELOG.md").read_text().lower().replace("-", "")
    for name in registry.names("shoal.strategies"):
        assert name in text
