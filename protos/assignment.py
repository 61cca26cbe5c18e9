"""One run's assignment: what every client of a run must know beside its tasks. It crosses once, by its hash.

It holds names and numbers, never code: a client builds strategy, model and loss from its own installation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.protos.errors import CodecError, NotAllowed
from shoal.protos.experiment import Component

__all__ = ["Assignment", "permitted", "portable"]


class Assignment(BaseModel):
    """Strategy, local training and model by name, with their arguments; the seed of all streams; the model's dtype."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    strategy: Component
    local: dict[str, Any]
    model: Component
    client: Component | None = None
    seed: int
    dtype: str

    def encode(self) -> bytes:
        """JSON; the same assignment gives the same bytes."""
        return json.dumps(self.model_dump(), sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Assignment:
        """CodecError if the bytes are no assignment."""
        try:
            return cls.model_validate(json.loads(data))
        except (ValueError, RecursionError, ValidationError) as error:
            raise CodecError(f"the server's assignment cannot be read ({error}); run the same version") from error

    def permitted(self, allowed: Sequence[str]) -> Assignment:
        """The assignment with each piece of code as its owner spells it; NotAllowed for what the owner did not allow.

        Installed components have plain names and are allowed. A name with a colon is code beside an installation.
        """

        def own(component: Component) -> Component:
            return component.model_copy(update={"name": permitted(component.name, allowed)})

        local = dict(self.local)
        if isinstance(local.get("loss"), str):
            local["loss"] = permitted(local["loss"], allowed)
        if isinstance(local.get("metrics"), list):
            local["metrics"] = [permitted(str(name), allowed) for name in local["metrics"]]
        client = None if self.client is None else own(self.client)
        changes = {"strategy": own(self.strategy), "model": own(self.model), "client": client, "local": local}
        return self.model_copy(update=changes)


def permitted(name: str, allowed: Sequence[str]) -> str:
    """The owner's own spelling of ``file.py:name`` or ``module:name``: files fit by their last part."""
    if ":" not in name:
        return name
    for mine in allowed:
        if _portable(mine) == _portable(name):
            return mine
    raise NotAllowed(
        f"the server asks for {name!r}, which the client's owner did not allow; who trusts that code starts the client "
        f"with --allow {name}"
    )


def _portable(name: str) -> str:
    """Without the folder, which differs from machine to machine."""
    place, _, attribute = name.rpartition(":")
    return f"{PurePath(place).name if place.endswith('.py') else place}:{attribute}"


def portable(value: Any) -> Any:
    """A described component as it may leave this machine: without the folders of its files."""
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return _portable(value) if isinstance(value, str) and value.rpartition(":")[0].endswith(".py") else value
