"""Settings, metrics and other numbers as they stand in a header.

An integer stays an integer, a real number crosses with its bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.manifest import LIMITS, Limits, at_most, check_names, quote
from shoal.protos.messages import Setting

__all__ = ["read_metrics", "read_number", "read_settings", "write_metrics", "write_number", "write_settings"]

DEPTH = 16  # of lists in settings; protobuf gives up at 50


def write_settings(settings: Mapping[str, Setting]) -> list[wire.NamedSetting]:
    """CodecError for a value that has no wire form."""
    return [
        wire.NamedSetting(name=name, value=_write_setting(value, f"setting {quote(name)}"))
        for name, value in settings.items()
    ]


def read_settings(settings: Sequence[wire.NamedSetting], limits: Limits = LIMITS) -> dict[str, Setting]:
    """The inverse of :func:`write_settings`; CodecError for a name that stands there twice, or a missing value."""
    check_names((s.name for s in settings), "setting", limits)
    return {s.name: _read_setting(s.value, f"setting {quote(s.name)}") for s in settings}


def write_metrics(metrics: Mapping[str, float]) -> list[wire.Metric]:
    """CodecError for a value that is no number."""
    return [
        wire.Metric(name=name, value=write_number(value, f"metric {quote(name)}")) for name, value in metrics.items()
    ]


def read_metrics(metrics: Sequence[wire.Metric], limits: Limits) -> dict[str, float]:
    """The inverse of :func:`write_metrics`; CodecError for a name that stands there twice, or no finite number."""
    check_names((m.name for m in metrics), "metric", limits)
    return {m.name: read_number(m.value, f"metric {quote(m.name)}") for m in metrics}


def write_number(value: Any, what: str) -> wire.Number:
    """One client's number, integer or real; CodecError, about ``what`` it is, for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return wire.Number(integer=_int64(value, what))
    if isinstance(value, float):
        return wire.Number(real=value)
    raise CodecError(f"{what} is of type {type(value).__name__}; it must be a float or an int, one client's")


def read_number(number: wire.Number, what: str) -> float:
    """The inverse of :func:`write_number`; CodecError if it is missing or not finite."""
    value = number.real if number.HasField("real") else number.integer
    if number.WhichOneof("value") is None or not math.isfinite(value):
        raise CodecError(f"{what} is {value if number.HasField('real') else 'missing'}; it must be a finite number")
    return value


def _write_setting(value: Any, what: str, depth: int = 0) -> wire.Setting:
    at_most(DEPTH, depth, f"nested lists in {what}")
    match value:
        case bool():
            return wire.Setting(boolean=value)
        case int():
            return wire.Setting(integer=_int64(value, what))
        case float():
            return wire.Setting(real=value)
        case str():
            return wire.Setting(text=value)
        case bytes():
            return wire.Setting(raw=value)
        case list():
            return wire.Setting(list=wire.Settings(values=[_write_setting(v, what, depth + 1) for v in value]))
    raise CodecError(f"{what} holds a {type(value).__name__}; use bool, int, float, str, bytes or a list of these")


def _read_setting(setting: wire.Setting, what: str, depth: int = 0) -> Setting:
    at_most(DEPTH, depth, f"nested lists in {what}")
    kind = setting.WhichOneof("value")
    if kind is None:
        raise CodecError(f"{what} has no value that this version knows; run the same version of Shoal on both sides")
    if kind == "list":
        return [_read_setting(value, what, depth + 1) for value in setting.list.values]
    value: Setting = getattr(setting, kind)
    return value


def _int64(value: int, what: str) -> int:
    if not -(2**63) <= value < 2**63:
        raise CodecError(f"{what} is an integer of {value.bit_length()} bits; it must fit in 64: send a float or str")
    return value
