"""Components by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from shoal.protos import registry
from shoal.protos.errors import ExperimentError
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fedprox import FedProx

OWN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Own:
    size: int
    share: float = 0.5
    names: tuple[str, ...] = ()

def make(*parts, anything="x", **more):
    return parts, anything, more
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_registered_names() -> None:
    assert registry.load("shoal.strategies", "fedavg") is FedAvg
    assert registry.build("shoal.strategies", "fedprox", {"mu": 1}, "strategy") == FedProx(mu=1)


def test_a_file_is_loaded_once(own: str) -> None:
    assert registry.load("shoal.strategies", f"{own}:Own") is registry.load("shoal.models", f"{own}:Own")


def test_a_file_imports_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("SIZE = 3")
    (tmp_path / "json.py").write_text("SIZE = 4")
    (tmp_path / "one.py").write_text("import beside_it, json\nsize = lambda: (beside_it.SIZE, hasattr(json, 'SIZE'))")

    assert registry.load("shoal.models", f"{tmp_path / 'one.py'}:size")() == (3, False)


def test_a_module_path() -> None:
    assert registry.load("shoal.strategies", "shoal.strategies.fedavg:FedAvg") is FedAvg


def test_names_lead_back(own: str) -> None:
    thing = registry.load("shoal.strategies", f"{own}:Own")

    assert registry.name_of("shoal.strategies", FedAvg) == "fedavg"
    assert registry.name_of("shoal.strategies", thing) == f"{own}:Own"
    assert registry.name_of("shoal.strategies", lambda: None) is None
    described = registry.describe("shoal.strategies", thing(3, names=("a",)))
    assert described == {"name": f"{own}:Own", "size": 3, "share": 0.5, "names": ("a",)}


def test_arguments_are_checked(own: str) -> None:
    def build(**arguments: object) -> object:
        return registry.build("shoal.strategies", f"{own}:Own", arguments, "part")

    assert build(size=1, share=1, names=["a", "b"]) == registry.load("shoal.x", f"{own}:Own")(1, 1, ("a", "b"))
    for arguments, message in (
        ({}, "'part.size' is missing"),
        ({"size": "1"}, "'part.size' is '1': input should be a valid integer"),
        ({"size": True}, "'part.size' is True"),
        ({"size": 1, "sizes": 2}, "unknown key 'part.sizes'.*did you mean 'size'"),
        ({"size": 1, "names": [1]}, "'part.names' is"),
    ):
        with pytest.raises(ExperimentError, match=message):
            build(**arguments)


def test_open_ended_functions_take_anything(own: str) -> None:
    assert registry.build("shoal.models", f"{own}:make", {"a": 1}, "model") == ((), "x", {"a": 1})


def test_components_made_in_python_are_checked_too() -> None:
    registry.validate(FedProx(), "strategy")
    with pytest.raises(ExperimentError, match=r"'strategy.mu' is -1"):
        registry.validate(FedProx(mu=-1), "strategy")
    with pytest.raises(ExperimentError, match=r"'strategy.weighting' is 'unifrom'"):
        registry.validate(FedAvg("unifrom"), "strategy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedavgg", "did you mean 'fedavg'"),
        ("no.such.module:x", "cannot import 'no.such.module'"),
        ("nothing.py:x", "there is no file 'nothing.py'"),
        ("shoal.strategies.fedavg:FedAvgg", "did you mean 'FedAvg'"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(message)):
        registry.load("shoal.strategies", name)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a = 1\n1 / 0\n", r"broken\.py, line 2: ZeroDivisionError"), ("def (", r"broken\.py, line 1: SyntaxError")],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ExperimentError, match=message):
        registry.load("shoal.strategies", f"{tmp_path / 'broken.py'}:x")
