"""The processes that train, from outside: real ones, which end in every way that a process can end."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.client import workers as module
from shoal.client.workers import WorkerLost, Workers

Job = dict[str, Any]
MINE = """
import os, signal, sys, time
from pathlib import Path

def well():
    return [[1.0]], [0]

def ended():
    os._exit(3)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def long():
    raise ValueError("x" * 200_000)

def loud():
    print("{}", flush=True)
    os.write(1, b"no JSON\\n")
    return well()

def asking():
    input("your name? ")

def waiting(gate: str, started: str):
    Path(started).touch()
    open(gate).close()
    return well()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """``mine("ended")``: the job to read data with this function of a user's."""
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)

    def look(function: str, **arguments: str) -> Job:
        data = {"name": f"{path}:{function}", **arguments}
        return {"kind": "look", "client": "a", "data": data, "allow": [], "device": "cpu"}

    return look


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def crew(loop: asyncio.Runner) -> Iterator[Workers]:
    """One process for all tests that leave it alive."""

    async def make() -> Workers:
        return Workers(1)

    workers = loop.run(make())
    yield workers
    loop.run(workers.close())


@pytest.fixture
def waiting(mine: Callable[..., Job], tmp_path: Path) -> tuple[Job, Path, Path]:
    """A job that waits at a gate, the gate, and a file that it makes when it has begun."""
    gate, started = tmp_path / "gate", tmp_path / "started"
    os.mkfifo(gate)
    return mine("waiting", gate=str(gate), started=str(started)), gate, started


async def there(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.01)


def only(workers: Workers) -> Process:
    (process,) = workers._all
    return process


FINE = {"about": "1 examples to train on, 0 held out"}


def test_a_process_is_kept_for_the_next_job(loop: asyncio.Runner, crew: Workers, mine: Callable[..., Job]) -> None:
    assert loop.run(crew.run(mine("well"))) == FINE
    process = only(crew)
    assert loop.run(crew.run(mine("well"))) == FINE
    assert only(crew) is process


def test_what_code_prints_or_asks_for_does_not_disturb(
    loop: asyncio.Runner, crew: Workers, mine: Callable[..., Job]
) -> None:
    assert loop.run(crew.run(mine("loud"))) == FINE
    assert "EOF when reading a line" in loop.run(crew.run(mine("asking")))["error"]
    assert loop.run(crew.run(mine("well"))) == FINE


def test_an_error_of_any_length_arrives(loop: asyncio.Runner, crew: Workers, mine: Callable[..., Job]) -> None:
    assert len(loop.run(crew.run(mine("long")))["error"]) > 200_000


def test_a_job_that_nobody_wants_any_more_ends_by_itself_if_it_can(
    loop: asyncio.Runner, crew: Workers, waiting: tuple[Job, Path, Path], mine: Callable[..., Job]
) -> None:
    job, gate, started = waiting

    async def leave() -> Process:
        running = asyncio.create_task(crew.run(job))
        await there(started)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        process = only(crew)
        await asyncio.to_thread(lambda: gate.open("w").close())
        assert await crew.run(mine("well")) == FINE
        return process

    assert loop.run(leave()) is only(crew)


def test_a_process_that_dies_without_a_job_costs_none(
    loop: asyncio.Runner, crew: Workers, mine: Callable[..., Job]
) -> None:
    async def die() -> None:
        await crew.run(mine("well"))
        before = only(crew)
        before.kill()
        await before.wait()
        assert await crew.run(mine("well")) == FINE
        assert only(crew) is not before

    loop.run(die())


@pytest.mark.parametrize(("function", "fate"), [("ended", "exit code 3"), ("killed", "killed by signal 9")])
@pytest.mark.fault(23)
def test_a_process_that_dies_over_a_job_is_told_and_replaced(
    loop: asyncio.Runner, crew: Workers, mine: Callable[..., Job], function: str, fate: str
) -> None:
    with pytest.raises(WorkerLost, match=fate):
        loop.run(crew.run(mine(function)))

    assert loop.run(crew.run(mine("well"))) == FINE
    assert len(crew._all) == 1


def test_a_process_without_work_ends(
    loop: asyncio.Runner, crew: Workers, mine: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE", 0.01)

    async def idle() -> int | None:
        await crew.run(mine("well"))
        process = only(crew)
        return await asyncio.wait_for(process.wait(), 20)

    assert loop.run(idle()) == 0
    assert not crew._idle


def test_a_job_that_does_not_end_when_nobody_wants_it_is_killed(
    loop: asyncio.Runner, waiting: tuple[Job, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.01)
    job, _, started = waiting

    async def leave() -> int | None:
        workers = Workers(1)
        running = asyncio.create_task(workers.run(job))
        await there(started)
        process = only(workers)
        running.cancel()
        async with asyncio.timeout(20):
            await workers._free.acquire()  # as the next job would
        await workers.close()
        return process.returncode

    assert loop.run(leave()) == -signal.SIGKILL


def test_closing_in_the_middle_of_everything_leaves_nobody(
    loop: asyncio.Runner, waiting: tuple[Job, Path, Path], mine: Callable[..., Job]
) -> None:
    job, _, started = waiting

    async def close() -> list[int | None]:
        workers = Workers(2)
        running = [asyncio.create_task(workers.run(each)) for each in (job, mine("well"), mine("well"))]
        await there(started)
        processes = list(workers._all)
        running[0].cancel()
        await asyncio.wait([running[0]])
        await workers.close()
        await asyncio.gather(*running[1:], return_exceptions=True)
        return [process.returncode for process in processes]

    assert None not in loop.run(close())


PARENT = """
import asyncio, json, sys
from shoal.client.workers import Workers

async def main():
    workers = Workers(1)
    running = asyncio.create_task(workers.run(json.loads(sys.argv[1])))
    while not workers._all:
        await asyncio.sleep(0.01)
    print(next(iter(workers._all)).pid, flush=True)
    await running

asyncio.run(main())
"""


def test_a_process_ends_with_its_parent_whatever_it_is_at(waiting: tuple[Job, Path, Path]) -> None:
    job, _, started = waiting
    command = [sys.executable, "-c", PARENT, json.dumps(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        asyncio.run(asyncio.wait_for(there(started), 30))
        parent.kill()
    ended, _, _ = select.select([child], [], [], 20)
    os.close(child)

    assert ended


@pytest.mark.parametrize("name", ["shoal.client.host", "shoal.connect"])
def test_the_process_that_talks_imports_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('torch', 'pandas', 'flwr', 'plotly', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
