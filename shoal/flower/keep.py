"""What a Flower run keeps to go on with: records, arrays and plain values in one safetensors file.

Arrays are its tensors; everything else is JSON in its header. Nothing is pickled, so a value of another kind is
refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from safetensors import safe_open
from safetensors.numpy import save

from shoal.protos.errors import RunError
from shoal.protos.files import write_whole

__all__ = ["Kept", "Unkeepable", "attributes", "read", "read_arrays", "restore", "write", "write_arrays"]

RECORDS = {kind.__name__: kind for kind in (ArrayRecord, ConfigRecord, MetricRecord, RecordDict)}
PLAIN = (bool, int, float, str, type(None))


class Unkeepable(Exception):
    """A value that cannot be kept: where it is, and what."""


@dataclass(frozen=True)
class Kept:
    """A value as it was at one time: whatever becomes of its lists and arrays."""

    header: str
    tensors: dict[str, np.ndarray]

    @classmethod
    def of(cls, content: Any, name: str = "") -> Kept:
        """:class:`Unkeepable` names what cannot be written; ``name`` tells its arrays from those of other values."""
        tensors = _Tensors(name)
        return cls(json.dumps(_encoded(content, tensors, "")), tensors)


class _Tensors(dict[str, np.ndarray]):
    """Arrays by their numbers, behind a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def put(self, array: np.ndarray) -> str:
        name = f"{self._name}{len(self)}"
        self[name] = array
        return name


def write(path: Path, content: Kept, results: Kept, nodes: Mapping[int, Kept]) -> None:
    """Two mappings, and what nodes have, which is kept apart because few of them change; whole or not at all."""
    tensors = content.tensors | results.tensors
    for kept in nodes.values():
        tensors |= kept.tensors
    of_nodes = ",".join(f'"{node}":{kept.header}' for node, kept in nodes.items())
    headers = {"content": content.header, "results": results.header, "nodes": f"{{{of_nodes}}}"}
    write_whole(path, [save(tensors, metadata=headers)])


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` has written, nodes as ``"nodes"``; RunError if the file is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            content, results, nodes = (json.loads(file.metadata()[name]) for name in ("content", "results", "nodes"))
            kept = {int(node): _decoded(value, tensors) for node, value in nodes.items()}
            return {**_decoded(content, tensors), **_decoded(results, tensors), "nodes": kept}
    except Exception as error:  # of a Rust library, too
        raise RunError(f"{path} cannot be read ({error}); start the run anew") from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A model's arrays under their own names, for whoever wants to use it."""
    write_whole(path, [save({name: np.asarray(array, order="C") for name, array in arrays.items()})])


def read_arrays(run: str | Path) -> dict[str, np.ndarray]:
    """The global model that a Flower run has left in its folder, by name; RunError if it left none."""
    path = Path(run) / "arrays.safetensors"
    if not path.is_file():
        raise RunError(f"{run} holds no arrays; the run ended early, or its app does not say what its model is")
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def attributes(strategy: Strategy) -> dict[str, Any]:
    """What a strategy has in its attributes, those of a wrapped one too.

    Functions and frozen values the app gives again.
    """
    found = dict[str, Any]()
    for name, value in vars(strategy).items():
        frozen = is_dataclass(value) and getattr(value, "__dataclass_params__").frozen  # noqa: B009
        if isinstance(value, Strategy):
            found[name] = attributes(value)
        elif not (frozen or callable(value) or isinstance(value, ModuleType)):
            found[name] = value
    return found


def restore(strategy: Strategy, kept: dict[str, Any]) -> None:
    """Give a strategy, made again by its app, the attributes it had."""
    for name, value in kept.items():
        inner = vars(strategy).get(name)
        if isinstance(inner, Strategy):
            restore(inner, value)
        else:
            setattr(strategy, name, value)


def _encoded(value: Any, tensors: _Tensors, where: str) -> Any:
    """As JSON: a plain value as it is, anything else as ``[kind, …]``; arrays go into ``tensors``."""
    if isinstance(value, Array):
        name = tensors.put(np.frombuffer(value.data, dtype=np.uint8))
        return ["Array", value.dtype, list(value.shape), value.stype, name]
    if type(value).__name__ in RECORDS or type(value) is dict:
        items = [[_encoded(k, tensors, where), _encoded(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        return [type(value).__name__, items]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_encoded(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        kind = "ndarray" if isinstance(value, np.ndarray) else "scalar"
        return [kind, tensors.put(np.array(value, order="C"))]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if type(value) in PLAIN:
        return value
    raise Unkeepable(f"{where.lstrip('.')} is a {type(value).__name__}")


def _decoded(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "Array":
        dtype, shape, stype, name = rest
        return Array(dtype, tuple(shape), stype, tensors[name].tobytes())
    if kind in ("ndarray", "scalar"):
        return tensors[rest[0]] if kind == "ndarray" else tensors[rest[0]][()]
    if kind == "bytes":
        return base64.b64decode(rest[0])
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_decoded(item, tensors) for item in rest[0])
    made: Any = {} if kind == "dict" else RECORDS[kind]()
    for key, item in rest[0]:
        made[_decoded(key, tensors)] = _decoded(item, tensors)
    return made
