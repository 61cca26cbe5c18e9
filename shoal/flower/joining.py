"""Taking part in a Flower app that is served: this device holds its ClientApp. Needs neither flwr nor torch itself."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.client.host import Settings
from shoal.connect import Voice, state_of, take_part
from shoal.flower import check_version
from shoal.flower.app import FlowerApp, Scalar
from shoal.flower.places import PARTITION, said_of
from shoal.protos.errors import ExperimentError
from shoal.protos.overrides import value_of
from shoal.protos.transport import Address, check_exposure

__all__ = ["Device", "config_of"]

PAIR = re.compile(r"\s*([^\s=]+)=('[^']*'|\"[^\"]*\"|[^\s'\"]\S*)(?=\s|$)")  # as Flower's --node-config


@dataclass(frozen=True)
class Device:
    """The options of ``shoal flower client``, as they were typed."""

    path: Path
    server: str
    name: str | None = None
    config: str = ""
    tls: Path | None = None
    insecure: bool = False
    force: bool = False
    state: Path | None = None
    stay: bool = False
    patience: float | None = None

    def join(self) -> None:
        """Until the server has finished, or Ctrl-C."""
        voice = Voice()
        take_part(self.settings(voice), voice, "shoal flower client")

    def settings(self, voice: Voice) -> Settings:
        """Everything checked that can be without the server."""
        check_version()
        app, own = FlowerApp.read(self.path), config_of(self.config)
        address = Address.parse(self.server)
        data: dict[str, Any] = {"app": str(app.path), "config": own}
        return Settings(
            address,
            self.state or state_of(address),
            {self.name or socket.gethostname(): data},
            check_exposure(address, self.tls, self.insecure, self.force),
            once=not self.stay,
            patience=self.patience,
            note=voice.hear,
            program="shoal.flower.device",
            about=said_of(app, own),
        )


def config_of(text: str) -> Mapping[str, Scalar]:
    """What stands in ``--node-config``: ``key=value`` with spaces between; ExperimentError if it is something else."""
    found, position = dict[str, Scalar](), 0
    while text[position:].strip():
        pair = PAIR.match(text, position)
        value = None if pair is None else value_of(pair[2])
        if pair is None or not isinstance(value, Scalar):
            raise ExperimentError(
                f"--node-config {text!r} is not of the form 'key=value key=value' from {text[position:].strip()!r} on; "
                f"values are text, numbers or booleans"
            )
        found[pair[1]], position = value, pair.end()
    given = found.get(PARTITION, 0)
    if type(given) is not int:
        raise ExperimentError(f"--node-config has the partition-id {given!r}; it must be a whole number")
    return found
