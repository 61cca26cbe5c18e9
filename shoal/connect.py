"""Taking part: what stands on the command line of ``shoal client`` becomes the clients of this process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from shoal.client.host import Settings, host
from shoal.client.process import cores
from shoal.protos import registry
from shoal.protos.errors import DataError, ExperimentError, nearest
from shoal.protos.transport import Address, check_exposure

__all__ = ["Request", "connect"]

BY_SUFFIX = {".csv": "csv", ".npz": "npz", ".parquet": "parquet"}


@dataclass(frozen=True)
class Request:
    """The options of ``shoal client``, as they were typed."""

    server: str
    data: str
    options: Sequence[str] = ()
    name: str | None = None
    tls: Path | None = None
    insecure: bool = False
    force: bool = False
    allow: Sequence[str] = ()
    simulate: int | None = None
    skip: int = 0
    state: Path | None = None
    workers: int | None = None
    device: str = "cpu"
    once: bool = False
    patience: float | None = None
    said: dict[str, str] = field(default_factory=dict)

    def settings(self) -> Settings:
        """Everything checked that can be without the server."""
        address = Address.parse(self.server)
        certificates = check_exposure(address, self.tls, self.insecure, self.force)
        state = self.state or _home() / quote(str(address), safe=":[]")
        clients = self._hosted(state) if self.simulate is not None else self._single()
        if self.workers is not None and self.workers < 1:
            raise ExperimentError(f"--workers is {self.workers}; at least one process must train")
        workers = self.workers or (1 if self.simulate is None else cores())
        return Settings(
            address,
            state,
            clients,
            certificates,
            tuple(_absolute(name) for name in self.allow),
            self.device,
            workers,
            self.once,
            self.patience,
            self._note,
        )

    def _single(self) -> Mapping[str, Mapping[str, Any]]:
        if self.skip:
            raise ExperimentError("--skip leaves out shards of --simulate; give both or none")
        spec = _spec(self.data, _arguments(self.options))
        name = self.name or (unquote(Path(self.data).stem) if "name" not in spec else None)
        if name is None:
            raise ExperimentError("a client of this data needs a name; give it with --id")
        return {name: spec}

    def _hosted(self, state: Path) -> Mapping[str, Mapping[str, Any]]:
        if self.name is not None:
            raise ExperimentError("--simulate takes the clients' names from the data; leave --id out")
        folder = Path(self.data)
        if folder.suffix == ".toml":
            folder = _split(folder, self.options, state)
        elif self.options:
            raise ExperimentError(f"a folder of shards takes no {self.options[0]!r}; leave it out")
        if not folder.is_dir():
            raise DataError(f"--simulate needs a folder of shards or an experiment file, {self.data!r} is neither")
        files = sorted(folder.glob("*.npz"), key=lambda path: _natural(path.stem))
        count = self.simulate or 0
        chosen = files[self.skip : self.skip + count] if self.skip >= 0 < count else []
        if not chosen or len(chosen) < count:
            raise DataError(
                f"--simulate {self.simulate} after --skip {self.skip} asks for more shards than the {len(files)} in "
                f"{str(folder)!r}, or for none; make them with 'shoal data split'"
            )
        return {unquote(path.stem): {"path": str(path.resolve())} for path in chosen}

    def _note(self, client: str, text: str) -> None:
        """One line for one client; of many only what goes wrong, once."""
        if self.simulate is None:
            _say(f"{time.strftime('%H:%M:%S')}  {client}  {text}")
        elif not re.match(r"connected|round \d+: (update|measurement) delivered|task withdrawn", text):
            plain = text.replace(repr(client), "…")
            if self.said.get("last") != plain:
                _say(f"{time.strftime('%H:%M:%S')}  {client}  {text}")
            self.said["last"] = plain


def connect(request: Request) -> None:
    """Until the server has finished, or Ctrl-C."""
    settings = request.settings()
    names = list(settings.clients)
    who = names[0] if len(names) == 1 else f"{len(names)} clients, {names[0]} to {names[-1]}"
    _say(f"shoal client · {who} · server {settings.address}")

    async def main() -> None:
        running = asyncio.ensure_future(host(settings))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        await running

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _say(line: str) -> None:
    """Whoever reads may stop reading: the client goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _spec(data: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """``--data`` and its options as ``shard_of`` takes them."""
    path = Path(data).expanduser()
    suffix = path.suffix.lower()
    if (":" in data and not path.exists()) or data in registry.names("shoal.datasets"):
        return {"name": data, **arguments}
    if suffix == ".npz" and not arguments:
        return {"path": str(_there(path))}
    if suffix in BY_SUFFIX:
        return {"name": BY_SUFFIX[suffix], "path": str(_there(path)), **arguments}
    if path.is_dir():
        return {"name": "image-folder", "path": str(path.resolve()), **arguments}
    known = registry.names("shoal.datasets")
    raise DataError(f"--data {data!r} is no file, no folder of images and no reader{nearest(data, known)}")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r} (looked in {Path.cwd()}); correct --data")
    return path.resolve()


def _arguments(options: Sequence[str]) -> dict[str, Any]:
    from shoal.protos.experiment import override

    arguments: dict[str, Any] = {}
    for option in options:
        override(arguments, option)
    return arguments


def _split(experiment: Path, overrides: Sequence[str], state: Path) -> Path:
    """The experiment's own shards as files; in a process of its own, since that needs torch."""
    folder = state / "shards"
    command = "import sys; from shoal.cli import main; sys.argv[0] = 'shoal'; main()"
    words = ["data", "split", str(experiment), *overrides, "--to", str(folder), "--replace"]
    done = subprocess.run([sys.executable, "-c", command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise DataError(done.stderr.decode(errors="replace").strip().removeprefix("shoal: "))
    return folder


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Sorts 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text) if part]


def _absolute(name: str) -> str:
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).resolve()}:{attribute}" if place.endswith(".py") else name


def _home() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "shoal"
