"""Worker processes that are lost, and those that take their place."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal import FedAvg, LocalTraining
from shoal.client.data import Shard
from shoal.simulations import nursery
from shoal.simulations.crew import Crew, Died
from shoal.simulations.engine import Assignment, Job
from shoal.simulations.federated import LazyData
from shoal.simulations.packing import pack
from shoal.simulations.pool import Order
from shoal.simulations.shared import SharedBlock
from shoal.strategies.base import Context


def no_data(client: str) -> Shard:
    raise AssertionError(client)


@pytest.mark.slow
def test_an_order_dropped_while_its_worker_gets_ready_costs_that_order_alone() -> None:
    assignment = Assignment(lambda: nn.Linear(4, 3), LazyData(["a"], no_data, shape=(4,)), FedAvg(), LocalTraining())
    nothing = {"/buffers": torch.zeros(0), "/counters": torch.zeros(0, dtype=torch.int64)}
    packed, data = pack(assignment)
    with closing(data), closing(SharedBlock.of({"parameters": torch.zeros(15), **nothing})) as block:
        order: Any = Order(Job(0, [], Context(1, 1, 1)), block, {})
        with closing(Crew("shoal.simulations.worker", packed, 1)) as crew:
            crew.ready()
            crew._workers[0].process.kill()
            assert crew.submit(order).result() == Died("killed by signal 9")
            dropped = crew.submit(order)
            while (
                crew._workers[0]._does != "prepare"
            ):  # until the one that takes its place has the order, while it is starting
                pass
            crew.kill([dropped])

            assert isinstance(dropped.result(), Died)
            assert not isinstance(crew.submit(order).result(), Died)


ECHO = """
import os
from shoal.client.process import answers_on, jobs_on
from shoal.simulations.crew import read, write

def main():
    answers, orders = answers_on(), jobs_on()
    read(orders)
    write(answers, "ready")
    while True:
        try:
            said, fifo = read(orders)
        except EOFError:
            return
        if fifo:
            open(fifo).close()
        write(answers, said)
"""


@pytest.fixture
def echoes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Crew]]:
    """Crews whose workers say what they are told, as soon as somebody opens the pipe of this name (if it has one)."""
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    with ExitStack() as stack:

        def crew(workers: int) -> Crew:
            made = stack.enter_context(closing(Crew("echo", pickle.dumps("nothing"), workers)))
            made.ready()
            return made

        yield crew


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_worker_has_its_next_order_before_its_answer_is_looked_at(echoes: Callable[[int], Crew], fifo: Path) -> None:
    crew, at_next = echoes(1), list[bool]()
    first, second = crew.submit(("first", str(fifo))), crew.submit(("second", ""))
    first.add_done_callback(lambda _: at_next.append(second.running()))
    fifo.open("w").close()

    assert second.result(60) == "second" and first.result(60) == "first" and at_next == [True]


def test_only_the_worker_at_an_order_is_killed(echoes: Callable[[int], Crew], fifo: Path, tmp_path: Path) -> None:
    crew, never = echoes(2), tmp_path / "never"
    os.mkfifo(never)
    other, hanging = crew.submit(("other", str(fifo))), crew.submit(("hangs", str(never)))
    waiting = crew.submit(("waits", ""))
    while not hanging.running():
        pass
    crew.kill([hanging, waiting])

    assert hanging.result(60) == Died("killed by signal 9") and waiting.result(60) == "waits"
    fifo.open("w").close()
    assert other.result(60) == "other"


def test_an_order_that_cannot_be_sent_costs_nothing_else(echoes: Callable[[int], Crew]) -> None:
    crew = echoes(1)

    assert isinstance(crew.submit((threading.Lock(), "")).exception(60), TypeError)
    assert crew.submit(("next", "")).result(60) == "next"


def test_a_worker_that_cannot_be_replaced_costs_an_order_at_a_time(
    echoes: Callable[[int], Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(program: str) -> Any:
        raise OSError("no process is left")

    crew = echoes(1)
    with monkeypatch.context() as patch:
        patch.setattr(nursery, "start", full)
        crew._workers[0].process.kill()
        assert crew.submit(("lost", "")).result(60) == Died("killed by signal 9")
        assert str(crew.submit(("not begun", "")).exception(60)) == "no process is left"

    assert crew.submit(("next", "")).result(60) == "next"


def test_orders_that_wait_when_a_crew_closes_are_cancelled(echoes: Callable[[int], Crew], fifo: Path) -> None:
    crew = echoes(1)
    busy, waiting = crew.submit(("busy", str(fifo))), crew.submit(("waits", ""))
    while not busy.running():
        pass
    crew.close()

    assert isinstance(busy.result(60), Died) and waiting.cancelled()
