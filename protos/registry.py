"""Names for components: ``"fedprox"``, ``"dirichlet"``, ``"my_models.py:make_net"``.

A group (``"shoal.strategies"``, ``"shoal.models"``, …) is an entry-point group, so another package adds a strategy by
naming it in its ``pyproject.toml``. A name with a colon needs no packaging: ``file.py:attribute`` or
``package.module:attribute``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal.protos.errors import ExperimentError, ShoalError, nearest

__all__ = ["build", "describe", "load", "name_of", "names", "validate"]

USER_MODULE = "shoal_user_"


@lru_cache(maxsize=64)
def _group(group: str) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: str) -> list[str]:
    """The registered names of a group, sorted."""
    return sorted(_group(group))


def load(group: str, name: str) -> Any:
    """The object behind a name; ExperimentError if there is none."""
    return _by_path(name) if ":" in name else _registered(group, name)


@lru_cache(maxsize=256)
def _registered(group: str, name: str) -> Any:
    points = _group(group)
    if name not in points:
        kind = group.rpartition(".")[2]
        raise ExperimentError(f"there is no {name!r} in {kind}{nearest(name, points)}; or write 'file.py:name'")
    return points[name].load()


def _by_path(name: str) -> Any:
    place, _, attribute = name.rpartition(":")
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, ValueError) as error:
        raise ExperimentError(f"cannot import {place!r} for {name!r}: {error}") from error
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ExperimentError(f"{place!r} has no {attribute!r}{nearest(attribute, public)}")
    return getattr(module, attribute)


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExperimentError(f"there is no file {str(path)!r} (looked in {Path.cwd()})")
    resolved = path.resolve()
    # One module for one file, under a name of its own: a user's client.py must not shadow or be shadowed.
    name = f"{USER_MODULE}{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, resolved)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        # What lies beside it can be imported, as where Python runs a file; looked for last, so that it shadows nothing.
        if str(resolved.parent) not in sys.path:
            sys.path.append(str(resolved.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception) or isinstance(error, ShoalError):
                raise
            raise ExperimentError(f"{_where(error, resolved)}: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def _where(error: Exception, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{path.name}, line {line}" if line else path.name


def build(group: str, name: str, arguments: Mapping[str, object], where: str, kind: type = object) -> Any:
    """Call a registered class or function with ``arguments`` as they stand in an experiment file.

    ``where`` is the place for error messages (``"strategy"``), ``kind`` what must come out. ExperimentError for an
    unknown, missing or ill-typed argument names it as ``strategy.mu``.
    """
    make = load(group, name)
    _check_arguments(make, name, arguments, where)
    checked = {key: _checked(make, key, value, f"{where}.{key}") for key, value in arguments.items()}
    try:
        made = make(**checked)
    except ShoalError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in checked.items())
        raise ExperimentError(f"{where} {name!r} cannot be made with ({given}): {error}") from error
    if not isinstance(made, kind):
        raise ExperimentError(f"{where} {name!r} gives a {type(made).__name__}, it must be a {kind.__name__}")
    return made


def _check_arguments(make: Any, name: str, arguments: Mapping[str, object], where: str) -> None:
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{where} {name!r} is no class or function that can be called: {error}") from error
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for key in arguments:
        if key not in accepted and not open_ended:
            raise ExperimentError(f"unknown key '{where}.{key}' for {name!r}{nearest(key, accepted)}")
    for key, parameter in accepted.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and key not in arguments:
            raise ExperimentError(f"'{where}.{key}' is missing; {name!r} needs it")


def _checked(make: Any, key: str, value: object, where: str) -> object:
    """The value, validated against the parameter's annotation where it has one that pydantic understands."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError  # heavy: only when building

    annotation = _annotations(make).get(key)
    if annotation is None:
        return value
    try:
        adapter: TypeAdapter[object] = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return value  # a type of the user's own: the callable judges it
    try:
        # TOML has no tuples and users write 1 for 1.0; a number in a string stays an error.
        return adapter.validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        message = "it must be a list, such as ['a', 'b']" if first["type"] == "sequence_str" else first["msg"]
        raise ExperimentError(f"'{where}' is {value!r}: {message[0].lower()}{message[1:]}") from error


def _annotations(make: Any) -> Mapping[str, Any]:
    import typing

    target = make.__init__ if inspect.isclass(make) and "__dataclass_fields__" not in vars(make) else make
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        return {}  # annotations that cannot be resolved: no check rather than a false one


def name_of(group: str, thing: Any) -> str | None:
    """The name under which :func:`load` finds a class or function; None for one that only exists in memory."""
    module, qualname = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "<")
    for point in _group(group).values():
        if point.value == f"{module}:{qualname}":
            return point.name
    if module in (None, "__main__", "builtins") or "<" in qualname or "." in qualname:
        return None
    loaded = sys.modules.get(str(module))
    if loaded is None or getattr(loaded, qualname, None) is not thing:
        return None
    return f"{loaded.__file__}:{qualname}" if str(module).startswith(USER_MODULE) else f"{module}:{qualname}"


def describe(group: str, component: Any) -> dict[str, Any] | None:
    """A dataclass as an experiment file holds it, every field written out; None if it cannot be named."""
    name = name_of(group, type(component))
    if name is not None and not dataclasses.is_dataclass(component) and not vars(component):
        return {"name": name}  # nothing to remember
    if name is None or not dataclasses.is_dataclass(component):
        return None
    values = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    return {"name": name, **{key: value for key, value in values.items() if value is not None}}


def validate(component: Any, where: str) -> None:
    """Check a dataclass built in Python against its own annotations, as :func:`build` checks one from a file."""
    if dataclasses.is_dataclass(component):
        for f in dataclasses.fields(component):
            _checked(type(component), f.name, getattr(component, f.name), f"{where}.{f.name}")
