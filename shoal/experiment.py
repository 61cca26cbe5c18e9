"""An experiment in Python: what an experiment file says, with objects in place of names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from torch import nn

from shoal.client.client import Client
from shoal.client.local import LocalTraining
from shoal.client.losses import loss_named, metric_named
from shoal.protos import experiment as files
from shoal.protos import registry
from shoal.protos.assignment import Assignment, portable
from shoal.protos.errors import ExperimentError, nearest
from shoal.protos.experiment import Component, Evaluation, ExperimentFile
from shoal.protos.overrides import override
from shoal.server.callbacks import Callback
from shoal.simulations.datasets import Dataset, load
from shoal.simulations.federated import FederatedData
from shoal.strategies.base import Strategy
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.selectors import Selector, Uniform

if TYPE_CHECKING:
    from shoal.run import Run

__all__ = ["Experiment"]

Model = str | Mapping[str, Any] | Callable[..., nn.Module] | nn.Module


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is to be run.

    ``model`` is a registered name, a mapping with its arguments (``{"name": "mlp", "hidden": (64,)}``), a function that
    returns a module, or a module. ``shape`` and ``classes`` are passed from the data to a function that
    asks for them by these names. The other fields are those of an experiment file (docs/experiment.md).
    """

    model: Model
    data: Dataset | FederatedData | None = None
    strategy: Strategy = FedAvg()
    local: LocalTraining = LocalTraining()
    rounds: int = 10
    cohort: int = 10
    seed: int = 0
    name: str = "run"
    selector: Selector = Uniform()
    client: Client | str | Mapping[str, Any] | None = None
    callbacks: Sequence[Callback] = ()
    evaluation: Evaluation = Evaluation()
    target: Mapping[str, float] = field(default_factory=dict)
    quorum: float = 1.0
    over_select: float = 1.0
    deadline: float | None = None
    checkpoint_every: int = 10
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        parsed = files.parse(self._plain() | {"data": "checked elsewhere", "model": "checked elsewhere"})
        object.__setattr__(self, "evaluation", parsed.evaluation)  # a mapping will do as well
        for where, kind in (("strategy", Strategy), ("local", LocalTraining), ("selector", Selector)):
            if not isinstance(getattr(self, where), kind):
                given = type(getattr(self, where))
                raise ExperimentError(f"{where} is a {given.__name__}; {_instead(where, given)}")
            registry.validate(getattr(self, where), where)
        self._check_callbacks()
        loss_named(self.local.loss)
        known = {"loss", *(metric_named(metric)[0] for metric in self.local.metrics or ())}
        for name in self.target.keys() - known:
            raise ExperimentError(f"unknown key 'target.{name}'{nearest(name, known)}; name the loss or a metric")
        refusal = self.strategy.refuses(self.local)
        if refusal:
            raise ExperimentError(
                f"strategy {type(self.strategy).__name__} is not valid with local.optimizer = {self.local.optimizer!r}"
                f" as it is set: {refusal}"
            )

    def _check_callbacks(self) -> None:
        """A callback that watches a metric must not wait for one that never comes."""
        measured = {"loss", *(metric_named(metric)[0] for metric in self.local.metrics or ())}
        known = {f"test_{name}" for name in measured} if self.evaluation.every else set[str]()
        if self.evaluation.clients_every:
            known |= {f"clients_{name}{end}" for name in measured for end in ("", "_weighted", "_min", "_max")}
        for number, callback in enumerate(self.callbacks):
            where = f"callbacks.{number}"
            if not isinstance(callback, Callback):
                raise ExperimentError(f"{where} is {callback!r}, no shoal.Callback; derive it from that class")
            registry.validate(callback, where)
            metric = getattr(callback, "metric", "train_loss")
            if metric.startswith(("test_", "clients_")) and metric not in known:
                raise ExperimentError(f"'{where}.metric' is {metric!r}, which is not measured{nearest(metric, known)}")

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read an experiment file; ``overrides`` are ``"strategy.mu=0.1"`` as on the command line."""
        return cls.from_description(files.read(path, overrides))

    @classmethod
    def from_description(cls, file: ExperimentFile) -> Experiment:
        """Build the objects that a file names."""
        return cls(**{f.name: _made(f.name, file) for f in fields(cls)})

    def changed(self, changes: Sequence[str]) -> Experiment:
        """With changes as on the command line, ``"data.partition.alpha=0.1"``; the other parts are kept as they are.

        ExperimentError for a change of what only exists in Python.
        """
        content = copy.deepcopy(self.described())
        touched = {re.split(r"[.=]", change, maxsplit=1)[0].strip(): change for change in changes}
        for key, change in touched.items():
            if content.get(key, {}) is None:
                raise ExperimentError(f"{change!r} changes '{key}', which only exists in Python; give it by name")
        for change in changes:
            override(content, change)
        file = files.parse({"model": "kept"} | {key: value for key, value in content.items() if value is not None})
        return replace(self, **{key: _made(key, file) for key in touched})

    def simulate(
        self,
        *,
        engine: str = "auto",
        workers: int | None = None,
        ray_address: str | None = None,
        out: str | Path = "runs",
        progress: str = "auto",
    ) -> Run:
        """Run it here; ``workers`` processes (None: one a core, 0: in this process).

        ``engine`` is ``"auto"`` (found by measuring), ``"lean"`` (one after the other, any model), ``"captured"`` or
        ``"fused"`` (in blocks; ``"fused:64"`` says how large, so that a run can be repeated to the bit), or
        ``"ray"``: as auto, in actors of the cluster at ``ray_address`` (``"auto"``, host:port; None: one of its own).

        Ctrl-C ends the run after the round in progress; a second one abandons that round. Either way the state is
        kept, and :func:`shoal.resume` goes on to the same bits.
        """
        from shoal.simulate import simulate  # a cycle otherwise: composition stands on the experiment

        return simulate(self, engine=engine, workers=workers, ray_address=ray_address, out=Path(out), progress=progress)

    def serve(
        self,
        listen: str = "127.0.0.1:8470",
        *,
        tls: str | Path | None = None,
        insecure: bool = False,
        force: bool = False,
        wait_for: int | None = None,
        lease: float = 90.0,
        http: str | None = None,
        out: str | Path = "runs",
        anew: bool = False,
        progress: str = "auto",
    ) -> Run:
        """Run it on the clients that call ``listen``; see ``shoal server --help`` for the arguments.

        A run of it that was begun at this address and has not finished goes on, unless ``anew``.
        """
        from shoal.serve import Door, serve  # as above

        door = Door(listen, None if tls is None else str(tls), insecure, force, wait_for, lease, http=http)
        return serve([self], door, out=Path(out), progress=progress, anew=anew)[0]

    def make_model(self, data: FederatedData | None) -> _Maker:
        """The function that builds the module, with ``shape`` and ``classes`` filled in from the data, if there are."""
        return _Maker(self.model) if data is None else _Maker(self.model, data.shape, data.classes)

    def assignment(self, data: FederatedData | None) -> Assignment:
        """What every client of a run is told; ExperimentError for what only exists in this Python process."""
        described = self.described()
        for key in ("model", "local", "strategy", "client"):
            if described.get(key, {}) is None:
                raise ExperimentError(
                    f"{key} exists only in Python, but clients build it by name; register it, or give it as "
                    f"'file.py:name'"
                )
        model = _component(described["model"])
        maker = self.make_model(data)
        model |= maker.wanted(model)
        client = described.get("client")
        return Assignment(
            strategy=Component(**portable(described["strategy"])),
            local=portable(described["local"]),
            model=Component(**portable(model)),
            client=None if client is None else Component(**portable(client)),
            seed=self.seed,
            dtype=self.dtype,
        )

    def make_client(self) -> Client | None:
        """The custom client, built if it is given by name."""
        if self.client is None or isinstance(self.client, Client):
            return self.client
        arguments = _component(self.client)
        made: Client = registry.build("shoal.clients", arguments.pop("name"), arguments, "client", Client)
        return made

    def toml(self) -> str:
        """The experiment file, every default written out; what only exists in Python is named in a comment."""
        described = self.described()
        unnamed = [key for key, value in described.items() if value is None]
        note = f"{UNNAMED} {', '.join(unnamed)}\n" if unnamed else ""
        known = {key: _absolute(value) for key, value in described.items() if value is not None}
        return note + tomli_w.dumps(known)

    def described(self) -> dict[str, Any]:
        """As in a file; None stands for what no file can name."""
        described = self._plain() | {
            "model": _describe_model(self.model),
            "local": _describe_local(self.local),
            "strategy": registry.describe("shoal.strategies", self.strategy),
            "selector": registry.describe("shoal.selectors", self.selector),
        }
        if self.data is not None:
            described["data"] = self.data.spec if isinstance(self.data, Dataset) else None
        if self.callbacks:
            callbacks = [registry.describe("shoal.callbacks", callback) for callback in self.callbacks]
            described["callbacks"] = None if None in callbacks else callbacks
        if isinstance(self.client, Client):
            described["client"] = registry.describe("shoal.clients", self.client)
        elif self.client is not None:
            described["client"] = _component(self.client)
        return described

    def _plain(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OBJECTS}
        values["evaluation"] = dict(self.evaluation)
        values["target"] = dict(self.target)
        return {key: value for key, value in values.items() if value is not None}


EXAMPLES = {"strategy": "FedAvg()", "local": "LocalTraining(lr=0.1)", "selector": "Uniform()"}
UNNAMED = "# cannot be run again from this file alone: a Python object stands for"
_OBJECTS = frozenset({"model", "data", "strategy", "local", "selector", "client", "callbacks"})
_LOCAL = "shoal.client.local:LocalTraining"


def _instead(where: str, given: type) -> str:
    """What to do if something of another kind is given as a strategy, training or selector."""
    if where == "strategy" and any(base.__module__.startswith("flwr.") for base in given.__mro__):
        return "it is Flower's: shoal.flower.simulate(experiment, strategy) runs it"
    return f"give an object, for example shoal.{EXAMPLES[where]}"


def _made(key: str, file: ExperimentFile) -> Any:
    """One part of an experiment, from its description."""
    if key == "model":
        return file.model.model_dump()
    if key == "data":
        return None if file.data is None else load(file.data.name, **file.data.arguments)
    if key == "strategy":
        return registry.build("shoal.strategies", file.strategy.name, file.strategy.arguments, "strategy", Strategy)
    if key == "local":
        return registry.build("shoal.local", _LOCAL, file.local, "local")
    if key == "selector":
        return registry.build("shoal.selectors", file.selector.name, file.selector.arguments, "selector", Selector)
    if key == "callbacks":
        named = [(callback.name, callback.arguments, f"callbacks.{i}") for i, callback in enumerate(file.callbacks)]
        return [registry.build("shoal.callbacks", *one, Callback) for one in named]
    if key == "client":
        return None if file.client is None else file.client.model_dump()
    return getattr(file, key)


@dataclass(frozen=True)
class _Maker:
    """Builds the module; a class and not a closure, so that it is pickled by value with what it holds."""

    model: Model
    shape: tuple[int, ...] | None = None
    classes: int | None = None

    def __call__(self) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        if callable(self.model):
            made = self.model(**self._wanted(self.model, {}))
            if not isinstance(made, nn.Module):
                raise ExperimentError(f"the model function returned {type(made).__name__}, not a torch.nn.Module")
            return made
        arguments = _component(self.model) | self.wanted(_component(self.model))
        name = arguments.pop("name")
        module: nn.Module = registry.build("shoal.models", name, arguments, "model", nn.Module)
        return module

    def wanted(self, component: Mapping[str, Any]) -> dict[str, Any]:
        """What a named model takes from the data beside the arguments that it is given."""
        return self._wanted(registry.load("shoal.models", component["name"]), component)

    def _wanted(self, make: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
        if not callable(make):
            return {}  # for the registry to refuse
        known = {"shape": self.shape, "classes": self.classes}
        parameters = signature(make).parameters
        wanted = {key: value for key, value in known.items() if key in parameters and key not in given}
        for key in [key for key, value in wanted.items() if value is None]:
            if parameters[key].default is not Parameter.empty:
                del wanted[key]
                continue
            why = "there is no [data] here" if self.shape is None else "the data has no class labels"
            what = "the shape of an example" if key == "shape" else "the number of outputs"
            raise ExperimentError(f"{why}; set 'model.{key}' to {what}")
        return wanted


def _component(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """A name, or a mapping with a name and arguments, as a mapping of its own."""
    component = {"name": given} if isinstance(given, str) else dict(given)
    if not isinstance(component.get("name"), str):
        raise ExperimentError(f"{dict(component)!r} has no 'name'; give a name, or a mapping with a name and arguments")
    return component


def _describe_model(model: Model) -> dict[str, Any] | None:
    if isinstance(model, str | Mapping):
        return _component(model)
    name = None if isinstance(model, nn.Module) else registry.name_of("shoal.models", model)
    return None if name is None else {"name": name}


def _describe_local(local: LocalTraining) -> dict[str, Any] | None:
    values = {f.name: getattr(local, f.name) for f in fields(local) if getattr(local, f.name) is not None}
    values["loss"] = _named("shoal.losses", local.loss)
    values["metrics"] = [_named("shoal.metrics", metric) for metric in local.metrics or ()]
    return None if values["loss"] is None or None in values["metrics"] else values


def _named(group: str, thing: Any) -> str | None:
    return thing if isinstance(thing, str) else registry.name_of(group, thing)


def _absolute(value: Any) -> Any:
    """References to files as absolute paths, so that the copy in the run folder means the same from anywhere."""
    if isinstance(value, Mapping):
        return {key: _absolute(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_absolute(item) for item in value]
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, str):
        place, colon, attribute = value.rpartition(":")
        if colon and place.endswith(".py"):
            return f"{Path(place).resolve()}:{attribute}"
    return value
