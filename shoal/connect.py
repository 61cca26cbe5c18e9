"""Taking part: what stands on the command line of ``shoal client`` becomes the clients of this process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from shoal.client.host import Settings, host
from shoal.client.process import cores
from shoal.protos import registry
from shoal.protos.errors import DataError, ExperimentError, nearest
from shoal.protos.transport import Address, check_exposure

__all__ = ["Request", "Voice", "connect", "state_of", "take_part"]

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

    def settings(self, voice: Voice | None = None) -> Settings:
        """Everything checked that can be without the server."""
        voice = voice or self.voice()
        address = Address.parse(self.server)
        certificates = check_exposure(address, self.tls, self.insecure, self.force)
        state = self.state or state_of(address)
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
            voice.hear,
        )

    def _single(self) -> Mapping[str, Mapping[str, Any]]:
        if self.skip:
            raise ExperimentError("--skip leaves out shards of --simulate; give both or none")
        spec = _spec(self.data, _arguments(self.options))
        name = self.name or (unquote(Path(self.data).stem) if "name" not in spec else None)
        if name is None:
            raise ExperimentError(
                "a client of this data needs a name; give it with --id (the one in the column that names the clients, "
                "if there is one)"
            )
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

    def voice(self) -> Voice:
        """Who tells people what happens."""
        return Voice() if self.simulate is None else _Crowd(self.simulate)


class Voice:
    """One client: a line for everything."""

    def hear(self, client: str, text: str) -> None:
        _say(f"{time.strftime('%H:%M:%S')}  {client}  {text}")

    def close(self) -> None:
        return


class _Crowd(Voice):
    """Many clients: a line for each round, and for what goes wrong."""

    def __init__(self, count: int) -> None:
        self._count, self._connected, self._last = count, set[str](), ""
        self._round, self._done = 0, Counter[str]()

    def hear(self, client: str, text: str) -> None:
        delivered = re.match(r"round (\d+): (update|measurement) delivered", text)
        if delivered:
            if int(delivered[1]) != self._round:
                self.close()
                self._round = int(delivered[1])
            self._done[delivered[2]] += 1
        elif text.startswith("connected"):
            self._connected.add(client)
            if len(self._connected) == self._count:
                super().hear(f"all {self._count}", text)
        elif "task withdrawn" not in text and text.replace(repr(client), "…") != self._last:
            self._last = text.replace(repr(client), "…")  # the same of many clients is said once
            super().hear(client, text)

    def close(self) -> None:
        if self._done:
            super().hear(f"round {self._round}", ", ".join(f"{n} {what}s delivered" for what, n in self._done.items()))
        self._done.clear()


def connect(request: Request) -> None:
    """Until the server has finished, or Ctrl-C."""
    voice = request.voice()
    take_part(request.settings(voice), voice)


def take_part(settings: Settings, voice: Voice, what: str = "shoal client") -> None:
    """The same with what came of the options; ``what`` was typed, as people shall read it."""
    names = list(settings.clients)
    who = names[0] if len(names) == 1 else f"{len(names)} clients, {names[0]} to {names[-1]}"
    _say(f"{what} · {who} · server {settings.address}")

    async def main() -> None:
        running = asyncio.ensure_future(host(settings))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        await running

    try:
        asyncio.run(main())
        voice.close()
        _say("the server has finished its runs")
    except asyncio.CancelledError:
        voice.close()
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
    if suffix == ".npz" and not {"x", "y", "clients", "dtype", "class_names", "client_test"} & arguments.keys():
        for key in arguments:
            raise DataError(f"a shard file takes no {key!r}; leave it out, or name the arrays with x=… y=…")
        return {"path": str(_there(path))}
    if suffix in BY_SUFFIX:
        return {"name": BY_SUFFIX[suffix], "path": str(_there(path)), **arguments}
    if path.is_dir() and any(path.glob("*.npz")):
        raise DataError(f"--data {data!r} is a folder of shards; give one of its files, or --simulate N to host many")
    if path.is_dir():
        return {"name": "image-folder", "path": str(path.resolve()), **arguments}
    known = registry.names("shoal.datasets")
    raise DataError(
        f"--data {data!r} is no file, no folder of images and no reader{nearest(data, known)}"
        + ("; give its key=value parts as words of their own" if "=" in data else "")
    )


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r} (looked in {Path.cwd()}); correct --data")
    return path.resolve()


def _arguments(options: Sequence[str]) -> dict[str, Any]:
    from shoal.protos.overrides import override

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


def state_of(address: Address) -> Path:
    """Where clients of a server keep what they keep, unless they say otherwise."""
    base = os.environ.get("XDG_STATE_HOME")
    home = (Path(base) if base else Path.home() / ".local" / "state") / "shoal"
    return home / quote(str(address), safe=":[]")
