"""A Flower app as it lies in its folder: ``pyproject.toml`` with ``[tool.flwr.app]``, a ServerApp and a ClientApp."""

from __future__ import annotations

import hashlib
import sys
import tomllib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any, Protocol

from shoal.protos.errors import ExperimentError, nearest
from shoal.protos.overrides import value_of

__all__ = ["App", "FlowerApp", "GivenApp", "Scalar", "changed"]

Scalar = bool | int | float | str
NODES = 2  # what 'flwr run' takes where nothing else is said


class App(Protocol):
    """What can be run: a folder, or Python objects. ``no_resume`` says why such a run cannot be resumed, if so."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Scalar]: ...
    @property
    def no_resume(self) -> str: ...
    @property
    def hash(self) -> str: ...
    def importable(self) -> AbstractContextManager[None]: ...
    def server_app(self) -> Any: ...
    def client_app(self) -> Any: ...
    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class FlowerApp:
    """``server`` and ``client`` are ``module:attribute``; ``config`` is the run config, flat, with its overrides.

    ``nodes`` is how many the app's own federation has.
    """

    path: Path
    name: str
    version: str
    server: str
    client: str
    config: Mapping[str, Scalar] = field(default_factory=dict)
    nodes: int = NODES
    no_resume = ""

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] | Mapping[str, Scalar] = ()) -> FlowerApp:
        """Read the app in this folder; ``overrides`` are ``"key=value"`` of its run config.

        ExperimentError if it is no app, or for a key that its config does not have.
        """
        path = Path(path).resolve()
        project = _project(path)
        app = _table(project, "tool", "flwr", "app")
        if not app:
            raise ExperimentError(f"{path / 'pyproject.toml'} has no [tool.flwr.app]: it describes no Flower app")
        components = _table(app, "components")
        for key in ("serverapp", "clientapp"):
            if ":" not in str(components.get(key, "")):
                raise ExperimentError(
                    f"{path / 'pyproject.toml'} must name a {key} as module:attribute in [tool.flwr.app.components]"
                )
        config = _override(_flat(_table(app, "config")), overrides)
        about = _table(project, "project")
        name, version = str(about.get("name", path.name)), str(about.get("version", "0"))
        return cls(path, name, version, components["serverapp"], components["clientapp"], config, _nodes(project))

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let the app's own modules be imported, and none of the same name that belong to somebody else.

        Afterwards they are forgotten: the next app may have modules of the same names.
        """
        own = {path.stem for path in self.path.glob("*.py")} | {p.parent.name for p in self.path.glob("*/__init__.py")}
        before = _forget(own)
        sys.path.insert(0, str(self.path))
        invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(self.path))
            _forget(own)
            sys.modules.update(before)

    def server_app(self) -> Any:
        """The ServerApp, inside :meth:`importable`; ExperimentError says why it cannot be loaded."""
        from flwr.serverapp import ServerApp

        return self._load(self.server, ServerApp)

    def client_app(self) -> Any:
        """The ClientApp, likewise."""
        from flwr.clientapp import ClientApp

        return self._load(self.client, ClientApp)

    def describe(self) -> dict[str, Any]:
        """What the run's folder says of it."""
        return {"app": str(self.path), "config": dict(self.config)}

    def _load(self, reference: str, kind: type) -> Any:
        module, _, attributes = reference.partition(":")
        try:
            found: Any = import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except Exception as error:
            raise ExperimentError(
                f"{reference!r} of the app in {self.path} cannot be loaded: {type(error).__name__}: {error}"
                f"{self._place(error)}"
            ) from error
        if not isinstance(found, kind):
            raise ExperimentError(
                f"{reference!r} of the app in {self.path} is a {type(found).__name__}, not a {kind.__name__}"
            )
        return found

    def _place(self, error: Exception) -> str:
        """`` (module.py:3)``: the innermost place in the app that an error comes from; empty if it is none of it."""
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((error.filename or "", error.lineno))
        own = [(Path(name), line) for name, line in places if Path(name).is_relative_to(self.path)]
        return f" ({own[-1][0].relative_to(self.path)}:{own[-1][1]})" if own else ""

    @property
    def hash(self) -> str:
        """SHA-256 over the app's Python files and its pyproject: whether it is still the same app."""
        digest = hashlib.sha256()
        for name, content in self.files().items():
            digest.update(f"{name}\0".encode() + content)
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """The app's pyproject and Python files, by their place in its folder, without those that are hidden in it."""
        places = [path.relative_to(self.path) for path in sorted(self.path.rglob("*.py"))]
        shown = [place for place in places if not any(part.startswith(".") for part in place.parts)]
        return {place.as_posix(): (self.path / place).read_bytes() for place in (Path("pyproject.toml"), *shown)}


@dataclass(frozen=True)
class GivenApp:
    """A ServerApp and a ClientApp that are there already: in a notebook, a script, a test."""

    server: Any
    client: Any
    config: Mapping[str, Scalar] = field(default_factory=dict)
    name: str = "app"
    version: str = ""
    hash: str = ""
    nodes: int = NODES
    no_resume = "it was made from Python objects"

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which need the ClientApp alone."""
        return {**vars(self), "server": None}

    @contextmanager
    def importable(self) -> Iterator[None]:
        yield

    def server_app(self) -> Any:
        return self.server

    def client_app(self) -> Any:
        return self.client

    def describe(self) -> dict[str, Any]:
        return {"config": dict(self.config)}


def _project(path: Path) -> dict[str, Any]:
    file = path / "pyproject.toml"
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ExperimentError(f"{file} cannot be read ({error.strerror}); give the folder of a Flower app") from error
    except ValueError as error:
        raise ExperimentError(f"{file} is not valid TOML: {error}") from error


def _table(content: Mapping[str, Any], *steps: str) -> dict[str, Any]:
    found: Any = content
    for step in steps:
        found = found.get(step, {}) if isinstance(found, Mapping) else {}
    return dict(found) if isinstance(found, Mapping) else {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables with their names joined by dots, as apps read them."""
    flat = dict[str, Scalar]()
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Scalar):
            flat[prefix + key] = value
        else:
            raise ExperimentError(
                f"key {prefix + key!r} of the app's config is {value!r}; Flower has text, numbers and booleans there"
            )
    return flat


def _override(config: dict[str, Scalar], overrides: Sequence[str] | Mapping[str, Scalar]) -> dict[str, Scalar]:
    changes = changed(overrides)
    for key, value in changes.items():
        if key not in config:
            raise ExperimentError(f"unknown key {key!r} of the app's config{nearest(key, config)}")
        if not isinstance(value, Scalar):
            raise ExperimentError(f"key {key!r} is {value!r}; give text, a number or a boolean")
        if isinstance(value, str) and not isinstance(config[key], str) and f"{key}={value}" in overrides:
            raise ExperimentError(  # text in quotes is meant as such
                f"key {key!r} of the app's config is {config[key]!r}, and {value!r} is text; several changes are "
                f"arguments of their own (a=1 b=2), and text that is meant has quotes ({key}='\"…\"')"
            )
    return config | changes


def changed(overrides: Sequence[str] | Mapping[str, Scalar]) -> dict[str, Scalar]:
    """A mapping of what is to be changed."""
    return dict(overrides) if isinstance(overrides, Mapping) else dict(map(_change, overrides))


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ExperimentError(f"override {text!r} is not of the form key=value, for example lr=0.1")
    return key.strip(), value_of(value.strip())


def _nodes(project: Mapping[str, Any]) -> int:
    """Of the federation that an older pyproject names as its default."""
    federations = _table(project, "tool", "flwr", "federations")
    options = _table(federations, str(federations.get("default", "")), "options")
    nodes = options.get("num-supernodes", NODES)
    return nodes if isinstance(nodes, int) and nodes > 0 else NODES


def _forget(names: set[str]) -> dict[str, Any]:
    """Take modules, and those below them, out of the loaded ones; what was there."""
    taken = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in taken}
