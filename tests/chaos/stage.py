"""A trial that goes on: its processes, its network, and the waiting for what they do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.cast import Actor, Broken, Trace
from tests.chaos.proxy import Proxy
from tests.chaos.world import World
from tests.server.test_tls import authority

__all__ = ["Stage", "free_port", "served"]

LOOK = 0.03  # seconds between two looks at the trace
LEASE = 90.0
PATIENCE = 120.0  # seconds without an accepted answer, after which a run hangs: the lease, and the longest back-off
FIRST_PORT, PORTS = 10_000, 20_000  # below the ephemeral ones


class Stage:
    """The processes of one world, behind one proxy; ``watched`` is what :class:`Actor` takes for the server."""

    def __init__(
        self, world: World, folder: Path, rng: random.Random, patience: float = PATIENCE, **watched: Any
    ) -> None:
        self.world, self.folder, self.rng, self.patience, self._watched = world, folder, rng, patience, watched
        self.trace = Trace(folder / "trace.jsonl")
        self.port = free_port()
        self.proxy = Proxy(self.port, random.Random(rng.random()))
        self.server: Actor
        self.hosts: list[Actor] = []
        self._down = set[Actor]()

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "0001-chaos"

    @property
    def actors(self) -> Sequence[Actor]:
        return [self.server, *self.hosts]

    # --- beginning and end -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self.proxy.start()
        safe = {name: self._certificates(name) for name in ("server", "client")}
        host = "localhost" if self.world.tls else "127.0.0.1"
        listen = ("--listen", f"127.0.0.1:{self.port}", *safe["server"])
        terms = ("--wait-for", self.world.sites, "--heartbeat", 1, "--lease", LEASE)
        serving = ("server", "experiment.toml", *listen, *terms)
        self.server = Actor("server", serving, self.folder, self.trace.path, **self._watched)
        for name, clients, words in self._parts():
            to = ("--connect", f"{host}:{self.proxy.port}", *safe["client"], "--state", f"state-{name}", "--once")
            allowed = ("--allow", f"{self.folder}/failing.py:Failing") if self.world.lenient else ()
            self.hosts.append(Actor(name, ("client", *to, *words, *allowed), self.folder, self.trace.path, clients))
        for actor in self.actors:
            await actor.start()

    def _parts(self) -> list[tuple[str, Sequence[str], Sequence[object]]]:
        """Who plays which clients."""
        names, hosted = self.world.names, self.world.hosted
        crowd = ("--data", "shards", "--simulate", hosted, "--workers", 1)
        alone = [(name, [name], ("--data", f"shards/{name}.npz")) for name in names[hosted:]]
        return [("crowd", names[:hosted], crowd), *alone] if hosted else [*alone]

    def _certificates(self, name: str) -> tuple[object, ...]:
        if not self.world.tls:
            return ("--insecure",)
        if not hasattr(self, "_issue"):
            self._issue = authority(self.folder / "tls")
        self._issue(name)
        return ("--tls", self.folder / "tls" / name)

    async def close(self) -> None:
        """End everything, whatever state it is in."""
        hosts = [actor for actor in self.hosts if actor.code is None]
        await asyncio.gather(*(actor.end() for actor in [self.server, *hosts] if hasattr(self, "server")))
        await self.proxy.close()

    # --- waiting -----------------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """The run is finished, and says so on disk: who is killed now is not started again."""
        try:
            return bool(json.loads((self.run / "summary.json").read_bytes())["status"] == "finished")
        except (OSError, ValueError):
            return False

    async def until(self, reached: Callable[[], bool], seconds: float, what: str) -> None:
        """Broken if that does not come, or if a process ends that nobody has killed."""
        ends = time.monotonic() + seconds
        while True:
            self.trace.look()
            if reached():
                return
            self._check()
            if time.monotonic() > ends:
                raise Broken(f"hung: {what} for {seconds:.0f} s\n{self.tails()}")
            await asyncio.sleep(LOOK)

    def _check(self) -> None:
        for actor in self.actors:
            if actor in self._down or actor.code in (None, 0) or self.over:
                continue
            raise Broken(f"{actor.name} ended by itself, with code {actor.code}:\n{actor.tail}")
        if self.server.code == 0 and not self.over:
            raise Broken(f"the server ended without finishing the run:\n{self.server.tail}")

    def accepted(self, after: float, clients: Collection[str] = ()) -> list[float]:
        """When answers (of those clients) were accepted since."""
        found = self.trace.of("accepted", after)
        return sorted(event["time"] for event in found if not clients or event["client"] in clients)

    async def answers(self, count: int) -> None:
        """Until so many more are accepted, or the run is over."""
        for _ in range(count):
            since = time.monotonic()
            await self.recovered(since, ())

    async def recovered(self, since: float, clients: Collection[str]) -> float | None:
        """Seconds until the next accepted answer; None if the run was over first."""

        def there() -> bool:
            return bool(self.accepted(since, clients)) or self.over

        await self.until(there, self.patience, f"no answer of {sorted(clients) or 'anybody'}")
        found = self.accepted(since, clients)
        return found[0] - since if found else None

    async def finish(self) -> None:
        """Until the run is over and the server has ended, as long as something moves."""
        while not self.over:
            await self.answers(1)
        if self.server.code not in (None, 0):  # killed when the run was over: it must find that out
            await self.server.start()
        await self.until(lambda: self.server.code is not None, self.patience, "the server does not end")
        if self.server.code != 0:
            raise Broken(f"the server ended with code {self.server.code}:\n{self.server.tail}")

    # --- killing -----------------------------------------------------------------------------------------------------

    async def killed(self, actor: Actor, point: str, count: int, whole: bool = False) -> bool:
        """Have it die at a point; False if the run was over first."""
        self._down.add(actor)
        actor.arm(point, count, whole)
        await self.until(lambda: actor.code is not None or self.over, self.patience, f"{actor.name} not at {point!r}")
        actor.disarm()
        if actor.code is not None and actor.code not in (0, -signal.SIGKILL):
            raise Broken(f"{actor.name} ended with code {actor.code} before {point!r}:\n{actor.tail}")
        if actor.code is None:
            self._down.discard(actor)
        return actor.code == -signal.SIGKILL

    async def kill(self, *actors: Actor) -> None:
        self._down.update(actors)
        await asyncio.gather(*(actor.kill() for actor in actors))

    async def stop(self, actor: Actor) -> None:
        """In the way that it is asked to; Broken if it does not end so."""
        self._down.add(actor)
        code = await actor.end(self.patience)
        if code not in (0, 130):
            raise Broken(f"{actor.name} ended with code {code} when it was asked to stop:\n{actor.tail}")

    async def start(self, *actors: Actor) -> bool:
        """Start again with the same command; False if the run is over."""
        if self.over:
            return False
        for actor in actors:
            await actor.start()
            self._down.discard(actor)
        return True

    def tails(self) -> str:
        return "\n".join(f"--- {actor.name} (code {actor.code})\n{actor.tail}" for actor in self.actors)


async def served(world: World, folder: Path, **watched: Any) -> Stage:
    """A run in good weather, to its end; everything that it did is in its trace."""
    world.prepare(folder)
    stage = Stage(world, folder, random.Random(0), patience=90, **watched)
    try:
        await stage.open()
        await stage.finish()
    finally:
        await stage.close()
    stage.trace.look()
    return stage


def free_port() -> int:
    """A port that can stay the same over restarts of the server.

    The system's own choice could not: it is one of those that outgoing connections get while the server is away.
    """
    while True:
        port = FIRST_PORT + secrets.randbelow(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
