"""The experiment file: its schema, and its reading with overrides.

The schema checks shape and numbers; what a component's own arguments mean is checked where the component is built
(:func:`shoal.protos.registry.build`). Every error names the dotted key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.protos.errors import ExperimentError, nearest
from shoal.protos.overrides import override

__all__ = [
    "Component",
    "Evaluation",
    "ExperimentFile",
    "lower_is_better",
    "parse",
    "read",
]

LOWER_IS_BETTER = ("loss", "mae", "mse", "error")


class Component(BaseModel):
    """A named part with its arguments beside it: ``{ name = "fedprox", mu = 0.01 }``, or just ``"fedprox"``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            raise ValueError("give a name, or a table with a name and its arguments")
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class Evaluation(BaseModel):
    """How often, in rounds, 0 for never; what is on also runs after the last round."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    every: Annotated[int, Ge(0)] = 1
    clients_every: Annotated[int, Ge(0)] = 0


class ExperimentFile(BaseModel):
    """An experiment as it is written. One file serves simulation, deployment and comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    name: str = "run"
    rounds: Annotated[int, Ge(1)]
    cohort: Annotated[int, Ge(1)]
    seed: Annotated[int, Ge(0)] = 0
    data: Component | None = None
    model: Component
    local: dict[str, Any] = Field(default_factory=dict)
    strategy: Component = Component(name="fedavg")
    selector: Component = Component(name="uniform")
    client: Component | None = None
    callbacks: list[Component] = Field(default_factory=list)
    evaluation: Evaluation = Evaluation()
    target: dict[str, float] = Field(default_factory=dict)
    quorum: Annotated[float, Gt(0), Le(1)] = 1.0
    over_select: Annotated[float, Ge(1)] = 1.0
    deadline: Annotated[float, Gt(0)] | None = None
    checkpoint_every: Annotated[int, Ge(0)] = 10
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"


def read(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentFile:
    """Read a TOML file and apply ``key=value`` overrides, dotted as in the file (``strategy.mu=0.1``)."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte-order mark
    except FileNotFoundError as error:
        raise ExperimentError(f"there is no experiment file {str(path)!r}; give the path of a .toml file") from error
    except IsADirectoryError as error:
        raise ExperimentError(f"{str(path)!r} is a folder; give the path of a .toml file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{str(path)!r} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{str(path)!r} is not valid TOML: {error}") from error
    for change in overrides:
        override(content, change)
    return parse(content)


def parse(content: Mapping[str, Any]) -> ExperimentFile:
    """Validate; the first error is raised with its dotted key and, for an unknown key, the nearest known one."""
    try:
        return ExperimentFile.model_validate(content)
    except ValidationError as error:
        raise ExperimentError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    # An unknown key often is the reason why a needed one is missing: name it first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = Evaluation.model_fields if first["loc"][0] == "evaluation" else ExperimentFile.model_fields
        return f"unknown key {key!r}{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing; the experiment file must set it"
    message = first["msg"].removeprefix("Value error, ")
    return f"key {key!r} is {first['input']!r}: {message[0].lower()}{message[1:]}"


def lower_is_better(metric: str) -> bool:
    """Whether a metric counts downwards, as its name says: ``test_loss``, ``clients_mae_min``."""
    return any(part in LOWER_IS_BETTER for part in metric.split("_"))
