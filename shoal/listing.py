"""The runs in a folder, how each stands, and what tells those of one name apart."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.protos.errors import RunError
from shoal.server.runs import RunFolder, list_runs

__all__ = ["listed", "told_apart"]


def listed(out: Path) -> list[dict[str, Any]]:
    """Each run's summary, with ``"run"``, its folder, and ``"differs"``, what not all runs of its name have alike."""
    folders = list_runs(out)
    differs = told_apart([_settings(folder) for folder in folders])
    return [
        {"run": str(folder.path), **_standing(folder), "differs": own}
        for folder, own in zip(folders, differs, strict=True)
    ]


def _standing(folder: RunFolder) -> dict[str, Any]:
    try:
        summary = folder.read("summary.json")
    except RunError:
        summary = {"status": "unreadable"}
    summary.setdefault("rounds", max((line["round"] for line in folder.lines("metrics.jsonl")), default="?"))
    if summary["status"] == "running" and not folder.in_use():
        summary["status"] = "killed"  # a run that ends says how; 'shoal resume' goes on with it
    return summary


def _settings(folder: RunFolder) -> dict[str, Any]:
    """The experiment's, by dotted keys; empty if its file cannot be read."""
    try:
        return _dotted(tomllib.loads(folder.experiment()))
    except RunError:
        return {}


def _dotted(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = dict[str, Any]()
    for key, value in content.items():
        name = before if key == "name" and before else f"{before}.{key}".strip(".")  # strategy, not strategy.name
        found |= _dotted(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def told_apart(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each what not all of the same ``"name"`` have alike."""
    groups = dict[Any, list[Mapping[str, Any]]]()
    for own in settings:
        groups.setdefault(own.get("name"), []).append(own)
    alike = {name: _alike(group) for name, group in groups.items()}
    return [{key: own[key] for key in own if key not in alike[own.get("name")]} for own in settings]


def _alike(group: Sequence[Mapping[str, Any]]) -> set[str]:
    first = group[0]
    return {key for key in first if all(key in other and other[key] == first[key] for other in group)}
