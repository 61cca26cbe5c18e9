"""One run of the app on a deployment of Flower: what its operator types, and what can be seen of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flower_faults.actors import Actor, command, environment
from benchmarks.flower_faults.app.pulled import expected, model
from tests.chaos.proxy import Proxy
from tests.chaos.stage import free_port

__all__ = ["NODES", "ROUNDS", "Stage"]

APP = Path(__file__).parent / "app"
NODES, ROUNDS = 2, 3
PATIENCE = 300.0  # seconds without news, after which a run hangs: Flower gives up half an answer after 180
LOOK = 0.05  # seconds between two looks at the trace
ASK = 5.0  # seconds between two questions for the run's status, each of which is a process
CONFIG = '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'


class Stage:
    """SuperLink, SuperExec and SuperNodes, each node behind a proxy of its own.

    ``apart``: the SuperExec is a service of its own (``--isolation process``), as in Flower's container images;
    else the SuperLink starts it, which is the default.
    """

    def __init__(self, folder: Path, rng: random.Random, apart: bool = True) -> None:
        self.folder, self.rng, self.apart = folder, rng, apart
        self._environment, self._port = environment(folder / "home"), free_port()
        self.superlink = self._actor("superlink", *self._superlink())
        self._superexec = self._actor("superexec", "flower-superexec", "--insecure", *self._runtime())
        self.proxies = [Proxy(self._port, random.Random(rng.random())) for _ in range(NODES)]
        self.nodes = list[Actor]()
        self.restarts, self._run = 0, ""
        self._keeper: asyncio.Task[None] | None = None
        self.down = set[Actor]()

    def _actor(self, name: str, *words: object) -> Actor:
        return Actor(name, words, self.folder, self._environment)

    def _superlink(self) -> list[object]:
        """With its database on disk."""
        kept = ("--database", self.folder / "state.db", "--disable-runtime-dependency-installation")
        isolation = ("--isolation", "process" if self.apart else "subprocess")
        return ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", self._port, *kept, *isolation]

    def _runtime(self) -> list[object]:
        return ["--runtime-api-address", f"127.0.0.1:{self._port}"]

    @property
    def server(self) -> list[Actor]:
        """What runs on the server's machine."""
        return [self.superlink, self._superexec] if self.apart else [self.superlink]

    async def open(self) -> None:
        (self.folder / "home").mkdir()
        (self.folder / "home" / "config.toml").write_text(CONFIG.format(port=self._port))
        for actor in self.server:
            await actor.start()
        for number, proxy in enumerate(self.proxies):
            await proxy.start()
            where = ("--superlink", f"127.0.0.1:{proxy.port}", "--port", free_port())
            who = ("--node-config", f"partition-id={number} num-partitions={NODES}")
            self.nodes.append(self._actor(f"node-{number}", "flower-supernode", "--insecure", *where, *who))
        for node in self.nodes:
            await node.start()
        self._keeper = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """As a service manager: who has ended is started again."""
        while True:
            await asyncio.sleep(1)
            for actor in [*self.server, *self.nodes]:
                if not actor.alive and actor not in self.down:
                    self.restarts += 1
                    await actor.kill()
                    await actor.start()

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        for actor in [*self.server, *self.nodes]:
            await actor.kill()
        for proxy in self.proxies:
            await proxy.close()

    # --- what the operator types -------------------------------------------------------------------------------------

    async def submit(self) -> None:
        """``flwr run``, from the last round whose model the app has kept; again until the SuperLink takes it."""
        done = max((number for number in range(ROUNDS) if model(self.folder, number).exists()), default=0)
        settings = f"folder='{self.folder}' rounds={ROUNDS} nodes={NODES} done={done}"
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            told = await self._flwr("run", APP, "here", "--run-config", settings)
            if told.get("success"):
                self._run = told["run-id"]
                return
            await asyncio.sleep(1)
        raise TimeoutError(f"the SuperLink takes no run: {told}")

    async def status(self) -> str:
        told = await self._flwr("list", "here", "--run-id", self._run)
        return str(told["runs"][0]["status"]) if told.get("runs") else "unknown"

    async def stop(self) -> None:
        await self._flwr("stop", self._run, "here")

    async def _flwr(self, *words: object) -> Mapping[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *(command("flwr"), *map(str, words), "--format", "json"),
            cwd=self.folder,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            said, _ = await asyncio.wait_for(process.communicate(), 60)
            return dict(json.loads(said))
        except (TimeoutError, ValueError):
            return {}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    # --- what can be seen --------------------------------------------------------------------------------------------

    def events(self, what: str = "", **more: Any) -> list[Mapping[str, Any]]:
        """The trace's lines of a kind."""
        path = self.folder / "trace.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        wanted = {**({"what": what} if what else {}), **more}
        return [event for event in map(json.loads, lines) if wanted.items() <= event.items()]

    async def until(self, what: str, count: int = 1, **more: Any) -> None:
        """Until the trace says so for the nth time; TimeoutError if it says nothing new for long."""
        seen, since = -1, time.monotonic()
        while len(self.events(what, **more)) < count:
            if (now := len(self.events())) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError(f"no {what} {more}")
            await asyncio.sleep(LOOK)

    async def ended(self) -> str:
        """How the run ends: ``finished:completed``, ``finished:failed``, or ``hung`` if nothing happens for long."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < PATIENCE:
            if self.events("finished"):
                return "finished:completed"
            if (now := len(self.events())) != seen:
                seen, since = now, time.monotonic()
            status = await self.status()
            if status.startswith("finished") and status != "finished:completed":
                return status
            await asyncio.sleep(ASK)
        return "hung"

    def equal(self) -> bool:
        """Whether every round's model is that of an undisturbed run, but for the order of additions."""
        paths = [model(self.folder, number) for number in range(1, ROUNDS + 1)]
        wanted = [expected(NODES, number) for number in range(1, ROUNDS + 1)]
        return all(
            path.exists() and np.allclose(np.load(path), one, rtol=1e-9, atol=1e-12)
            for path, one in zip(paths, wanted, strict=True)
        )
