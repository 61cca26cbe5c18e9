"""The experiment file's schema and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.protos.errors import ExperimentError
from shoal.protos.experiment import parse, read

LEAST = {"rounds": 2, "cohort": 1, "data": "d", "model": {"name": "m", "width": 3}}


def test_defaults_and_short_forms() -> None:
    file = parse(LEAST)

    assert file.data is not None
    assert (file.data.name, file.data.arguments) == ("d", {})
    assert (file.model.name, file.model.arguments) == ("m", {"width": 3})
    assert (file.strategy.name, file.selector.name, file.quorum, file.seed) == ("fedavg", "uniform", 1.0, 0)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rounds=7", "rounds", 7),
        ("name=a b", "name", "a b"),
        ('name="7"', "name", "7"),
        ("quorum=0.5", "quorum", 0.5),
        ("target.accuracy=0.9", "target", {"accuracy": 0.9}),
        ("local.betas=[0.9, 0.99]", "local", {"betas": [0.9, 0.99]}),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: str, value: object) -> None:
    path = tmp_path / "e.toml"
    path.write_text('rounds = 2\ncohort = 1\ndata = "d"\nmodel = "m"')

    assert getattr(read(path, [override]), key) == value


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b'rounds = 2\ncohort = 1\ndata = "d"\nmodel = "m"')

    assert read(path).rounds == 2


def test_an_override_opens_the_short_form(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_text('rounds = 2\ncohort = 1\ndata = "d"\nmodel = "m"\nstrategy = "fedprox"')
    file = read(path, ["strategy.mu=0.5", "model=other"])

    assert (file.strategy.name, file.strategy.arguments, file.model.name) == ("fedprox", {"mu": 0.5}, "other")


def test_a_new_name_drops_the_old_arguments(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_text('rounds = 2\ncohort = 1\ndata = "d"\nmodel = "m"\n[strategy]\nname = "fedprox"\nmu = 1.0')

    assert read(path, ["strategy=scaffold"]).strategy.arguments == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohorts": 3}, r"unknown key 'cohorts' \(did you mean 'cohort'\?\)"),
        ({"rounds": "2"}, r"key 'rounds' is '2': input should be a valid integer"),
        ({"quorum": 1.5}, r"key 'quorum' is 1.5: input should be less than or equal to 1"),
        ({"over_select": 0.5}, r"key 'over_select' is 0.5"),
        ({"dtype": "float16"}, r"key 'dtype' is 'float16'"),
        ({"strategy": {}}, r"key 'strategy.name' is missing"),
        ({"strategy": 3}, r"key 'strategy' is 3"),
        ({"evaluation": {"evry": 1}}, r"unknown key 'evaluation.evry' \(did you mean 'every'\?\)"),
        ({"target": {"accuracy": "high"}}, r"key 'target.accuracy' is 'high'"),
    ],
)
def test_errors_name_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        parse(LEAST | change)


def test_a_misspelt_key_is_named_before_the_missing_one() -> None:
    with pytest.raises(ExperimentError, match="unknown key 'round'"):
        parse({"round": 2, "cohort": 1, "data": "d", "model": "m"})
