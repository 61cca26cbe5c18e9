"""Changes of an experiment file, and of a Flower app's config, that are given as ``key=value``."""

from __future__ import annotations

import tomllib
from typing import Any

from shoal.protos.errors import ExperimentError

__all__ = ["override", "value_of"]


def override(content: dict[str, Any], change: str) -> None:
    """Apply one ``key=value``, dotted as in the file; ExperimentError if it is none or does not fit."""
    key, equals, text = change.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise ExperimentError(f"override {change!r} is not of the form key=value, for example strategy.mu=0.1")
    table = content
    for step in steps[:-1]:
        inner = table.setdefault(step, {})
        # strategy = "fedavg" in the file, strategy.mu=0.1 here: the short form stands for {name = "fedavg"}.
        table[step] = {"name": inner} if isinstance(inner, str) else inner
        if not isinstance(table[step], dict):
            raise ExperimentError(f"override {change!r}: {step!r} is {inner!r}, not a table")
        table = table[step]
    table[steps[-1]] = value_of(text.strip())


def value_of(text: str) -> Any:
    """A TOML value; what is none is a string, so that names need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
