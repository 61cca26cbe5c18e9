"""The arms of a comparison: strategies, from how they are written on the command line to how they are called.

``fedavg``, ``fedprox:mu=0.01`` and ``my.py:MyStrategy:mu=0.1`` are written with colons between the pieces: those with
an equals sign are arguments, the others are the name. A bar stands between alternatives: ``fedprox:mu=0.01|0.1`` is two
arms, or one whose ``mu`` is to be tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tomli_w

from shoal.protos import registry
from shoal.protos.errors import ExperimentError
from shoal.protos.experiment import value_of
from shoal.strategies.base import Strategy

__all__ = ["alternatives", "arguments", "as_toml", "expand", "labelled", "parse", "split", "written"]

GROUP = "shoal.strategies"


def split(text: str, at: str = ",") -> list[str]:
    """The pieces of a text; a separator in brackets belongs to a value."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == at and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def alternatives(arm: str) -> tuple[str, dict[str, list[str]]]:
    """An arm without its arguments that have alternatives, and these: ``("fedprox", {"mu": ["0.01", "0.1"]})``."""
    fixed, open_ones = list[str](), dict[str, list[str]]()
    for piece in arm.split(":"):
        key, equals, values = piece.partition("=")
        if equals and len(split(values, "|")) > 1:
            open_ones[key.strip()] = split(values, "|")
        else:
            fixed.append(piece)
    return ":".join(fixed), open_ones


def expand(arm: str) -> list[str]:
    """An arm for each combination of its alternatives."""
    fixed, open_ones = alternatives(arm)
    chosen = product(*([f"{key}={value}" for value in values] for key, values in open_ones.items()))
    return [":".join([fixed, *pieces]) for pieces in chosen]


def parse(arm: str) -> Strategy:
    """The strategy that is written so; ExperimentError says what is wrong with it."""
    pieces = arm.split(":")
    name = ":".join(piece for piece in pieces if "=" not in piece)
    given = [piece.partition("=") for piece in pieces if "=" in piece]
    if not name or not all(key for key, _, _ in given):
        raise ExperimentError(f"{arm!r} is no strategy; write a name and its arguments, for example fedprox:mu=0.01")
    values = {key: value_of(text) for key, _, text in given}
    made: Strategy = registry.build(GROUP, name, values, "strategy", Strategy)
    return made


def labelled(strategies: Sequence[Strategy]) -> dict[str, Strategy]:
    """The arms by label: the name with the hyper-parameters that are not the default, or that tell arms apart."""
    if not strategies:
        raise ExperimentError("there is nothing to compare; name at least one strategy")
    arms: dict[str, Strategy] = {}
    for strategy in strategies:
        if not isinstance(strategy, Strategy):
            raise ExperimentError(f"{strategy!r} is no strategy; give an object, for example shoal.FedAvg()")
        label = _label(strategy, [other for other in strategies if type(other) is type(strategy)])
        if label in arms:
            raise ExperimentError(f"the arm {label!r} is given twice; give each once, or other arguments")
        arms[label] = strategy
    return arms


def _label(strategy: Strategy, alike: Sequence[Strategy]) -> str:
    defaults, given = _defaults(strategy), arguments(strategy)
    others = [arguments(other) for other in alike]
    telling = [k for k, v in given.items() if v != defaults.get(k) or any(other.get(k) != v for other in others)]
    return " ".join([_short_name(strategy), *(f"{key}={given[key]}" for key in telling)])


def arguments(strategy: Strategy) -> dict[str, str]:
    """As text, which can be compared whatever the values are."""
    return {field.name: as_toml(getattr(strategy, field.name)) for field in _fields(strategy)}


def _defaults(strategy: Strategy) -> dict[str, str]:
    return {field.name: as_toml(field.default) for field in _fields(strategy) if field.default is not MISSING}


def _fields(strategy: Strategy) -> tuple[Field[Any], ...]:
    return fields(strategy) if is_dataclass(strategy) else ()


def _short_name(strategy: Strategy) -> str:
    """As registered; ``my.py:Mine`` without the folders; the class where there is no such name."""
    name = registry.name_of(GROUP, type(strategy)) or type(strategy).__name__
    place, colon, attribute = name.rpartition(":")
    return f"{Path(place).name}{colon}{attribute}"


def written(strategy: Strategy) -> str | None:
    """The strategy as :func:`parse` reads it, every argument written out; None if it cannot be written so."""
    described = registry.describe(GROUP, strategy)
    if described is None:
        return None
    name = described.pop("name")
    values = {key: as_toml(value) for key, value in described.items() if value not in ((), [])}  # no list is none
    if set("".join([name.replace(":", ""), *values.values()])) & set(",:=[]{}"):
        return None
    return ":".join([name, *(f"{key}={value}" for key, value in values.items())])


def as_toml(value: Any) -> str:
    """A value as it stands behind an equals sign; a text without quotes."""
    if isinstance(value, str):
        return value
    try:
        return tomli_w.dumps({"value": value}).partition("=")[2].strip()
    except TypeError:
        return repr(value)
