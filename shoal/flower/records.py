"""Flower's records, faster: the same checks and contents, without what flwr works out anew for each entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

__all__ = ["quick_records"]

KINDS = {"array_records": ArrayRecord, "metric_records": MetricRecord, "config_records": ConfigRecord}
_Part: Any = type(RecordDict().array_records)
CHECKS: dict[type, dict[str, Any]] = {
    kind: {"_check_value_fn": partial(_Part.check_value, SimpleNamespace(allowed_type=kind)), "allowed_type": kind}
    for kind in KINDS.values()
}
_TypedDict: Any = next(kind for kind in RecordDict.__mro__ if kind.__name__ == "TypedDict")


def _set(record: Any, key: Any, value: Any) -> None:
    inside = record.__dict__
    inside["_check_key_fn"](key)
    inside["_check_value_fn"](value)
    inside["_data"][key] = value


def _part(kind: type, content: RecordDict) -> Any:
    """``content.array_records`` and so on; flwr's own is a cycle, which holds its arrays until somebody collects it."""
    part, inside = _Part.__new__(_Part), content.__dict__
    found = {name: record for name, record in inside["_data"].items() if isinstance(record, kind)}
    part.__dict__.update(inside, **CHECKS[kind], _data=found, recorddict=content)
    return part


@contextmanager
def quick_records() -> Iterator[None]:
    """Let all records of this process be filled and looked at in this way."""
    before = [(_TypedDict, "__setitem__"), *((RecordDict, name) for name in KINDS)]
    flwrs = [(owner, name, owner.__dict__[name]) for owner, name in before]
    _TypedDict.__setitem__ = _set
    for name, kind in KINDS.items():
        setattr(RecordDict, name, property(partial(_part, kind)))
    try:
        yield
    finally:
        for owner, name, attribute in flwrs:
            setattr(owner, name, attribute)
