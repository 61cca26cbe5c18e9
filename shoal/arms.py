"""The arms of a comparison: strategies, from how they are written on the command line to how they are called.

``fedavg``, ``fedprox:mu=0.01`` and ``my.py:MyStrategy:mu=0.1`` are written with colons between the pieces: those with
an equals sign are arguments, the others are the name. A bar stands between alternatives: ``fedprox:mu=0.01|0.1`` is two
arms, or one whose ``mu`` is to be tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tomli_w

from shoal.protos import registry
from shoal.protos.errors import ExperimentError
from shoal.protos.overrides import value_of
from shoal.strategies.base import Strategy

__all__ = ["Arm", "alternatives", "arguments", "as_toml", "bounds", "parse", "read", "split", "written"]

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


@dataclass(frozen=True)
class Arm:
    """A strategy, and the arguments of it that are to be tuned, with the alternatives of each."""

    strategy: Strategy
    open: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read(strategies: Sequence[Strategy | str], tuned: bool = False) -> dict[str, Arm]:
    """The arms by label. An argument with alternatives makes an arm of each, or is left open where arms are tuned."""
    found = list[Arm]()
    for given in strategies:
        if not isinstance(given, str):
            found.append(Arm(given))
            continue
        fixed, open_ones = alternatives(given)
        if tuned:
            first = ":".join([fixed, *(f"{key}={(bounds(v) or v)[0]}" for key, v in open_ones.items())])
            found.append(Arm(parse(first), open_ones))
        else:
            found += [Arm(parse(":".join([fixed, *pieces]))) for pieces in _combinations(open_ones)]
    return _labelled(found)


def alternatives(arm: str) -> tuple[str, dict[str, list[str]]]:
    """An arm without its arguments that have alternatives, and these: ``("fedprox", {"mu": ["0.01", "0.1"]})``."""
    fixed, open_ones = list[str](), dict[str, list[str]]()
    for piece in arm.split(":"):
        key, equals, text = piece.partition("=")
        values = split(text, "|")
        if equals and (len(values) > 1 or bounds(values)):
            open_ones[key.strip()] = values
        else:
            fixed.append(piece)
    return ":".join(fixed), open_ones


def bounds(values: Sequence[str]) -> tuple[float, float] | None:
    """The ends of a range, ``["0.001..1"]``; None for alternatives. ExperimentError for ends that make no range."""
    if len(values) != 1 or ".." not in values[0]:
        return None
    try:
        low, high = map(float, values[0].split(".."))
    except ValueError:
        return None  # such as a path
    if not 0 < low < high < math.inf:
        raise ExperimentError(f"{values[0]!r} is no range to draw from; write it as low..high, both above 0")
    return low, high


def _combinations(open_ones: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    for key, values in open_ones.items():
        if bounds(values):
            raise ExperimentError(f"'{key}={values[0]}' is a range, which only --tune searches; write values with a |")
    return list(product(*([f"{key}={value}" for value in values] for key, values in open_ones.items())))


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


def _labelled(given: Sequence[Arm]) -> dict[str, Arm]:
    """By name with the hyper-parameters that are not the default, or that tell arms apart; none that is tuned."""
    if not given:
        raise ExperimentError("there is nothing to compare; name at least one strategy")
    found: dict[str, Arm] = {}
    for arm in given:
        if not isinstance(arm.strategy, Strategy):
            raise ExperimentError(f"{arm.strategy!r} is no strategy; give an object, for example shoal.FedAvg()")
        label = _label(arm, [other.strategy for other in given if type(other.strategy) is type(arm.strategy)])
        if label in found:
            raise ExperimentError(f"the arm {label!r} is given twice; give each once, or other arguments")
        found[label] = arm
    return found


def _label(arm: Arm, alike: Sequence[Strategy]) -> str:
    defaults, given = _defaults(arm.strategy), arguments(arm.strategy)
    others = [arguments(other) for other in alike]
    telling = [k for k, v in given.items() if v != defaults.get(k) or any(other.get(k) != v for other in others)]
    shown = [f"{key}={given[key]}" for key in telling if key not in arm.open]
    return " ".join([_short_name(arm.strategy), *shown])


def arguments(strategy: Strategy) -> dict[str, str]:
    """As text, which can be compared whatever the values are."""
    return {f.name: as_toml(getattr(strategy, f.name)) for f in _fields(strategy)}


def _defaults(strategy: Strategy) -> dict[str, str]:
    return {f.name: as_toml(f.default) for f in _fields(strategy) if f.default is not MISSING}


def _fields(strategy: Strategy) -> tuple[Field[Any], ...]:
    return fields(strategy) if is_dataclass(strategy) else ()


def _short_name(strategy: Strategy) -> str:
    """As registered; ``my.py:Mine`` without the folders; the class where there is no such name."""
    name = registry.name_of(GROUP, type(strategy)) or type(strategy).__name__
    place, colon, attribute = name.rpartition(":")
    return f"{Path(place).name}{colon}{attribute}"


def written(arm: Arm) -> str | None:
    """The arm as :func:`read` reads it, every argument written out; None if it cannot be written so."""
    described = registry.describe(GROUP, arm.strategy)
    if described is None:
        return None
    name = described.pop("name")
    values = {key: as_toml(value) for key, value in described.items() if value not in ((), [])}  # no list is none
    if set("".join([name.replace(":", ""), *values.values()])) & set(",:=[]{}|"):
        return None
    values |= {key: "|".join(alternatives) for key, alternatives in arm.open.items()}
    return ":".join([name, *(f"{key}={value}" for key, value in values.items())])


def as_toml(value: Any) -> str:
    """A value as it stands behind an equals sign; a text without quotes."""
    if isinstance(value, str):
        return value
    try:
        return tomli_w.dumps({"value": value}).partition("=")[2].strip()
    except TypeError:
        return repr(value)
