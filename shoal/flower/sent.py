"""A Flower app on its way to another machine, which may not have its folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.flower.app import FlowerApp
from shoal.simulations.shared import alive

__all__ = ["Sent"]

PREFIX = "shoal-app-"


@dataclass(frozen=True)
class Sent:
    """An app with its pyproject and Python files, which is what ``flwr run`` sends of an app, too."""

    app: FlowerApp
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, app: FlowerApp) -> Sent:
        return cls(app, app.files())

    @contextmanager
    def importable(self) -> Iterator[None]:
        """As :meth:`FlowerApp.importable`: from the app's own folder where it is here and the same, else unpacked."""
        with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as folder:
            app = self.app if self._is_here() else replace(self.app, path=self._unpacked(Path(folder)))
            with app.importable():
                yield

    def client_app(self) -> Any:
        return self.app.client_app()

    def _is_here(self) -> bool:
        try:
            return self.app.files() == self.files
        except OSError:
            return False

    def _unpacked(self, folder: Path) -> Path:
        """What killed actors have left is swept away by the next one."""
        for left in folder.parent.glob(f"{PREFIX}*"):
            owner = left.name.removeprefix(PREFIX).partition("-")[0]
            if owner.isdecimal() and not alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder
