"""What determines a run, as a key: two experiments of one key give the same numbers, so one run serves both.

Into the key go the experiment as it is written, the bytes of its data, the code that a user brought, the engine,
Shoal's own source and the versions of what it computes with. Not into it: names, targets and how often state is kept.
What only exists in Python goes in as it is pickled by value; should that differ between two processes, a run is made
twice, which costs time but no truth. Not seen is a module that a user's file imports from a place of its own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from shoal.client.losses import loss_named, metric_named
from shoal.experiment import Experiment
from shoal.protos import registry
from shoal.simulations.datasets import Dataset
from shoal.simulations.federated import ArrayData, FederatedData
from shoal.simulations.packing import by_value
from shoal.versions import versions

__all__ = ["data_key", "run_key"]

IRRELEVANT = ("name", "target", "checkpoint_every", "data")
ROOMS = ("shoal", "protos", "strategies", "client", "server", "simulations")


def run_key(experiment: Experiment, data: str, engine: str) -> str:
    """Sixteen hexadecimal digits; ``data`` is the :func:`data_key` of the experiment's data."""
    described = {key: value for key, value in experiment.described().items() if key not in IRRELEVANT}
    unnamed = {key: _pickled(getattr(experiment, key)) for key, value in described.items() if value is None}
    facts = [described | unnamed, data, _sources(experiment), engine, versions(), _own_source()]
    return _digest([json.dumps(facts, sort_keys=True, default=_plain).encode()])[:16]


def data_key(data: Dataset | FederatedData | None) -> str:
    """A hash of rows, clients and how they are split, wherever they were read from."""
    if isinstance(data, Dataset):
        tables = [table for table in (data.train, data.test) if table is not None]
        arrays = [array for table in tables for array in (table.x, table.y, table.clients)]
        rest = [len(tables), *(table.class_names for table in tables), data.client_test, data.partitioner]
        return _digest([*map(_array, arrays), _pickled(rest).encode()])
    if isinstance(data, ArrayData):
        tests = [] if data.test is None else [data.test.x, data.test.y]
        arrays = [tensor.numpy() for tensor in (data.x, data.y, *tests)]
        return _digest([*map(_array, arrays), _pickled([dict(data.offsets), data.classes]).encode()])
    return _pickled(data)


def _array(array: np.ndarray | None) -> bytes:
    if array is None or array.dtype.hasobject:
        return _pickled(array).encode()
    whole = np.ascontiguousarray(array)
    return f"{whole.dtype.str} {whole.shape} {hashlib.sha256(whole.data if whole.size else b'').hexdigest()}".encode()


def _pickled(thing: Any) -> str:
    with by_value():
        return _digest([cloudpickle.dumps(thing, protocol=5)])


def _plain(value: Any) -> Any:
    """For what a description holds beside TOML's own values."""
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, Path) else _pickled(value)


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


# --- code ------------------------------------------------------------------------------------------------------------


def _sources(experiment: Experiment) -> dict[str, str]:
    """The files that the experiment's parts and their base classes are written in, but Shoal's own, by hash."""
    local = experiment.local
    parts: list[Any] = [type(experiment.strategy), type(experiment.selector), type(experiment.make_client())]
    parts += map(type, experiment.callbacks)
    parts += [loss_named(local.loss), *(metric_named(metric)[1] for metric in local.metrics or ())]
    if isinstance(experiment.data, Dataset):
        parts.append(type(experiment.data.partitioner))
    if isinstance(experiment.model, str | Mapping):
        name = experiment.model if isinstance(experiment.model, str) else experiment.model["name"]
        parts.append(registry.load("shoal.models", name))
    else:
        parts.append(experiment.model if inspect.isroutine(experiment.model) else type(experiment.model))
    homes = {base.__module__ for part in parts for base in (inspect.getmro(part) if inspect.isclass(part) else [part])}
    files = (getattr(sys.modules.get(home), "__file__", None) for home in homes if home.partition(".")[0] != "shoal")
    found = [Path(file) for file in files if file and Path(file).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


@lru_cache(maxsize=1)
def _own_source() -> str:
    """Shoal's own files: whoever changes a rule must not be shown what the old one gave."""
    homes = [sys.modules[f"shoal.{room}" if room != "shoal" else room].__file__ for room in ROOMS]
    files = [path for home in homes if home for path in sorted(Path(home).parent.glob("*.py"))]
    return _digest(path.read_bytes() for path in files)
