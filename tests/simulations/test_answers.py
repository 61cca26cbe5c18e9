"""Answers in memory that is lent: no bit is lost, and nothing is overwritten while somebody looks at it."""

from __future__ import annotations

import errno
import os
import pickle
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch

from shoal.simulations.answers import MOST, Answers, pack
from shoal.simulations.shared import SharedMemory


@pytest.fixture
def answers() -> Iterator[Answers]:
    lending = Answers()
    yield lending
    lending.close()


def draw(seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    large, whole = torch.randn(3, 5000, generator=generator), torch.randint(0, 9, (9000,), generator=generator)
    return {"large": large, "double": large.double().t(), "whole": whole, "small": torch.ones(3), "text": f"{seed}"}


def same(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    def alike(x: object, y: object) -> bool:
        both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        return torch.equal(x, y) and x.dtype == y.dtype if both else x == y  # type: ignore[arg-type, attr-defined]

    return a.keys() == b.keys() and all(map(alike, a.values(), b.values()))


def test_the_first_answer_goes_with_the_message_and_tells_how_much_memory_there_should_be(answers: Answers) -> None:
    assert answers.lend() is None
    assert same(answers.open(pack(draw(0), None), None), draw(0))
    lent = answers.lend()
    assert lent is not None
    answer = pack(draw(1), lent)
    assert len(answer.message) < 2000
    assert same(answers.open(answer, lent), draw(1))


def test_memory_comes_back_when_the_last_tensor_is_gone_and_not_before(answers: Answers) -> None:
    answers.open(pack(draw(0), None), None)
    lent = answers.lend()
    found = answers.open(pack(draw(1), lent), lent)
    view = found["large"][1, 100:]
    del found
    assert answers.lend() is not lent
    assert torch.equal(view, draw(1)["large"][1, 100:])  # type: ignore[index]
    del view
    assert answers.lend() is lent


def test_an_answer_that_outgrows_its_memory_goes_with_the_message(answers: Answers) -> None:
    answers.open(pack({"a": torch.ones(9000)}, None), None)
    lent = answers.lend()
    larger = {"a": torch.ones(9000), "b": torch.full((9000,), 2.0)}
    assert same(answers.open(pack(larger, lent), lent), larger)
    again = answers.lend()
    assert again is not lent and again is not None
    assert len(pack(larger, again).message) < 2000


def test_memory_of_a_lost_worker_is_lent_again(answers: Answers) -> None:
    answers.open(pack(draw(0), None), None)
    lent = answers.lend()
    answers.back(lent)
    assert answers.lend() is lent


def test_where_there_is_no_memory_the_answer_goes_with_the_message(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.open(pack(draw(0), None), None)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert answers.lend() is None
    assert same(answers.open(pack(draw(1), None), None), draw(1))
    monkeypatch.undo()
    assert answers.lend() is not None


def test_no_more_is_lent_than_there_may_be_open_files(answers: Answers) -> None:
    answers.open(pack({"a": torch.ones(9000)}, None), None)
    lent = [answers.lend() for _ in range(MOST + 1)]

    assert lent[-1] is None and len({memory.path for memory in lent if memory is not None}) == MOST
    answers.back(lent[0])
    assert answers.lend() is lent[0]


def test_memory_that_has_become_too_small_is_given_up(answers: Answers) -> None:
    answers.open(pack({"a": torch.ones(9000)}, None), None)
    small = answers.lend()
    assert small is not None
    answers.open(pack({"a": torch.ones(18000)}, None), None)
    answers.back(small)

    assert not small.path.exists() and answers.lend() is not small


def test_a_process_attaches_once_and_lets_go_of_what_is_gone() -> None:
    first, second = SharedMemory(100), SharedMemory(100)
    attached = pickle.loads(pickle.dumps(first))
    first.array()[:] = 7
    assert attached is not first and attached is pickle.loads(pickle.dumps(first)) and (attached.array() == 7).all()

    gone = weakref.ref(attached)
    del attached
    first.close()
    assert gone() is not None
    pickle.loads(pickle.dumps(second))
    assert gone() is None
