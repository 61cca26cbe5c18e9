"""The campaign's targets, shortly: right inputs, damaged ones, and all that ever broke one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import calls, decoders

quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)
BROKEN = sorted(Path(__file__).parent.glob("broken/*"))


@quick
@given(st.sampled_from(decoders.seeds()), st.data())
def test_decoders_answer_damaged_input(seed: bytes, data: st.DataObject) -> None:
    damaged = bytearray(seed)
    for at in data.draw(st.lists(st.integers(0, len(seed) - 1), max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))

    decoders.run(bytes(damaged))


@quick
@given(st.sampled_from(decoders.seeds()), st.randoms(use_true_random=False))
def test_decoders_answer_messages_that_are_wrong(seed: bytes, rng: random.Random) -> None:
    decoders.run(decoders.mutate(decoders.mutate(seed, rng), rng))


@pytest.mark.parametrize("seed", decoders.seeds())
def test_decoders_take_what_is_right(seed: bytes) -> None:
    decoders.run(seed)


@pytest.mark.slow
def test_calls_take_what_is_right() -> None:
    for seed in calls.seeds():
        calls.run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.name)
def test_what_broke_a_target_does_so_no_more(path: Path) -> None:
    (decoders if path.name.startswith("decoders") else calls).run(path.read_bytes())
