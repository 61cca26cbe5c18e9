"""Streams depend on their name alone, and stay what they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shoal.protos import seeds

NAMES = list(itertools.product([0, 1, 2**63], ["batches", "cohort"], [0, 1, 2], ["", "a", "b", "ä"]))


def draw(seed: int, purpose: str, round: int = 0, client: str = "") -> list[int]:
    drawn: list[int] = seeds.stream(seed, purpose, round, client).integers(0, 2**63, 8).tolist()
    return drawn


def test_every_name_has_its_own_stream() -> None:
    drawn = [number for name in NAMES for number in draw(*name)]

    assert len(set(drawn)) == len(drawn)
    assert len({seeds.integer(*name) for name in NAMES}) == len(NAMES)


def test_neither_order_nor_neighbours_change_a_stream() -> None:
    forwards = {name: draw(*name) for name in NAMES}
    generators = {name: seeds.stream(*name) for name in reversed(NAMES)}
    interleaved: dict[tuple[int, str, int, str], list[int]] = {name: [] for name in NAMES}
    for _ in range(8):
        for name, generator in generators.items():
            interleaved[name].append(int(generator.integers(0, 2**63)))

    assert forwards == interleaved


def test_seed_and_purpose_do_not_run_into_each_other() -> None:
    assert draw(1, "1/x") != draw(11, "x")
    assert draw(1, "2/x") != draw(12, "x")


@pytest.mark.parametrize(
    ("name", "integer", "numbers", "real"),
    [
        ((0, "batches"), 4678227874616441980, [1307839874, 3031487310, 2134843087], 0.7058231416867359),
        ((0, "batches", 1, "c"), 5920061764247062400, [1162534734, 265747882, 1111125315], 0.06187425047873363),
        ((7, "cohort", 3), 1975932606546213903, [3896051793, 999357600, 1974392671], 0.23268107345959177),
    ],
)
def test_streams_are_the_same_in_every_version(
    name: tuple[int, str], integer: int, numbers: list[int], real: float
) -> None:
    assert seeds.integer(*name) == integer
    assert seeds.stream(*name).integers(0, 2**32, 3).tolist() == numbers
    assert seeds.stream(*name).random() == real


def test_an_integer_suits_any_other_generator() -> None:
    assert all(0 <= seeds.integer(*name) < 2**63 for name in NAMES)


def test_drawing_leaves_no_trace_in_the_next_stream() -> None:
    seeds.stream(3, "x").integers(0, 2**63, 1000)
    before = repr(np.random.get_state())

    assert draw(3, "x") == draw(3, "x")
    assert repr(np.random.get_state()) == before


def test_a_restarted_generator_is_the_stream_of_its_new_name() -> None:
    """Whatever it drew before: half of a 64-bit word may be left over from 32-bit draws."""
    generator = seeds.stream(0, "batches", 1, "a")
    for draws in range(4):
        generator.integers(0, 2**32, draws, dtype=np.uint32)
        seeds.restart(generator, 7, "batches", 5, "b")
        assert generator.permutation(50).tolist() == seeds.stream(7, "batches", 5, "b").permutation(50).tolist()
