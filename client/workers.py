"""The processes that train, seen from the one that talks: started when there is work, ended when there is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Coroutine, Mapping
from typing import Any

from shoal.client.process import command, environment, fate

__all__ = ["WorkerLost", "Workers"]

IDLE = 60.0  # seconds without work after which torch's memory is worth more than its start
LINE = 2**22  # bytes of an answer: an error may be long
GRACE = 2.0  # seconds for a task that nobody wants any more to end by itself


class WorkerLost(Exception):
    """The process died over a job: why, in words."""


class Workers:
    """At most ``count`` processes that run ``main`` of the module ``program``; a job waits until one is free."""

    def __init__(self, count: int, program: str = "shoal.client.worker") -> None:
        self._program = program
        self._idle: list[Process] = []
        self._free = asyncio.Semaphore(count)
        self._all: set[Process] = set()
        self._endings: dict[Process, asyncio.TimerHandle] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer to a job; WorkerLost if it dies."""
        await self._free.acquire()
        try:
            process = await self._take()
            answer = asyncio.ensure_future(_call(process, job))
        except BaseException:
            self._free.release()
            raise
        try:
            found = await asyncio.shield(answer)
        except asyncio.CancelledError:
            self._later(self._abandon(process, answer))
            raise
        except WorkerLost:
            self._all.discard(process)
            self._free.release()
            raise
        self._give(process)
        return found

    def _later(self, leaving: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(leaving)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _take(self) -> Process:
        while self._idle:
            process = self._idle.pop()
            self._endings.pop(process).cancel()
            if process.returncode is None:
                return process
            self._all.discard(process)  # it died without a job: nobody's failure
        process = await asyncio.create_subprocess_exec(
            *command(self._program),
            stdin=PIPE,
            stdout=PIPE,
            env=environment(),
            start_new_session=True,
            limit=LINE,
        )
        self._all.add(process)
        return process

    def _give(self, process: Process) -> None:
        self._idle.append(process)
        self._endings[process] = asyncio.get_running_loop().call_later(IDLE, self._end, process)
        self._free.release()

    def _end(self, process: Process) -> None:
        self._idle.remove(process)
        self._endings.pop(process).cancel()
        self._later(self._part(process))

    async def _part(self, process: Process) -> None:
        """Its input ends, and so does it."""
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        self._all.discard(process)

    async def _abandon(self, process: Process, answer: asyncio.Future[dict[str, Any]]) -> None:
        """Nobody wants the answer: let it end by itself, which saves a start, or kill it."""
        done, _ = await asyncio.wait([answer], timeout=GRACE)
        if done and answer.exception() is None:
            self._give(process)
            return
        self._all.discard(process)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        with contextlib.suppress(WorkerLost):
            await answer
        self._free.release()

    async def close(self) -> None:
        for ending in self._endings.values():
            ending.cancel()
        for process in list(self._all):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await asyncio.gather(*self._leaving, return_exceptions=True)


async def _call(process: Process, job: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it is gone, which the next line finds out
        process.stdin.write(json.dumps(job).encode() + b"\n")
        await process.stdin.drain()
    line = await process.stdout.readline()
    if not line:
        raise WorkerLost(fate(await process.wait()))
    return dict(json.loads(line))
