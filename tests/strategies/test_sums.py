"""The round's sum: the same bits for any workers, order of arrival and crash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.protos.errors import RoundError
from shoal.strategies.base import Context, Update, vector
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.scaffold import Scaffold
from shoal.strategies.sums import LEAF, Carried, Contribution, LeafSum, add_up, carry, contribute

CONTEXT = Context(round=0, population=100, asked=100)


def draw(count: int) -> list[Contribution]:
    """Contributions of which the order of addition shows: magnitudes from 1e-8 to 1e8, float32."""
    rng = torch.Generator().manual_seed(count)
    scale = 10.0 ** (16 * torch.rand(count, 1, generator=rng) - 8)
    values = torch.randn(count, 6, generator=rng) * scale
    return [
        Contribution({"delta": v, "weight": float(v[0]) * 3}, v + 1, torch.tensor([i, -i, 7]), abs(float(v[1])))
        for i, v in enumerate(values)
    ]


def bits(total: Contribution | None) -> tuple[object, ...]:
    """All of a sum, so that ``==`` means bit for bit."""
    assert total is not None
    vectors = [vector(total.terms, "delta"), total.buffers, total.counters]
    raw = [None if v is None else v.numpy().tobytes() for v in vectors]
    return (*raw, total.terms["weight"], total.examples, total.counted)


def leaf_sum(parts: Iterable[tuple[int, Contribution]]) -> LeafSum:
    sum_ = LeafSum()
    for position, part in parts:
        sum_.add(position, part)
    return sum_


def total(parts: Iterable[tuple[int, Contribution]]) -> tuple[object, ...]:
    return bits(leaf_sum(parts).total())


def by_hand(values: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Leaves of 16 positions, each from first to last, then the leaves: the definition, in two loops."""
    leaves: dict[int, Tensor] = {}
    for position, value in values:
        leaf = position // 16
        leaves[leaf] = leaves[leaf] + value if leaf in leaves else value
    result, *rest = (leaves[leaf] for leaf in sorted(leaves))
    for leaf_value in rest:
        result = result + leaf_value
    return result


def whole_leaves(parts: Sequence[tuple[int, Contribution]]) -> list[tuple[int, Contribution]]:
    """What workers hand in: one sum a leaf, at the first position that answered."""
    groups: dict[int, list[tuple[int, Contribution]]] = {}
    for position, part in parts:
        groups.setdefault(position // LEAF, []).append((position, part))
    sums = [(group[0][0], add_up(part for _, part in group)) for group in groups.values()]
    return [(position, part) for position, part in sums if part is not None]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 50])
def test_the_order_is_the_documented_one(count: int) -> None:
    parts = draw(count)
    values = [vector(part.terms, "delta") for part in parts]
    result = leaf_sum(enumerate(parts)).total()
    assert result is not None
    assert torch.equal(vector(result.terms, "delta"), by_hand(list(enumerate(values))))
    assert result.counted == count


def test_the_order_matters() -> None:
    """These numbers can tell: left to right over all, or another order, gives other bits."""
    parts = draw(40)
    right = total(enumerate(parts))
    assert bits(add_up(parts)) != right
    assert total(enumerate(reversed(parts))) != right


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), seed=st.integers(0, 2**32), lost=st.sets(st.integers(0, 49)))
def test_arrival_order_workers_and_failures_leave_no_trace(count: int, seed: int, lost: set[int]) -> None:
    """Singles in any order, whole leaves in any order, and any mixture: the bits of those that answered, in order."""
    rng = Random(seed)
    parts = [(i, part) for i, part in enumerate(draw(count)) if i not in lost]
    if not parts:
        return
    expected = total(parts)
    leaves = whole_leaves(parts)
    assert total(rng.sample(parts, len(parts))) == expected
    assert total(rng.sample(leaves, len(leaves))) == expected
    summed = {position // LEAF: (position, part) for position, part in leaves if rng.random() < 0.5}
    mixture = [*summed.values(), *((i, part) for i, part in parts if i // LEAF not in summed)]
    assert total(rng.sample(mixture, len(mixture))) == expected


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, LEAF), min_size=3, max_size=3))
def test_a_part_may_hold_the_beginning_of_a_leaf(cuts: list[int]) -> None:
    """A worker that died within a leaf: its sum so far, then single clients."""
    parts = list(enumerate(draw(3 * LEAF)))
    resumed = []
    for leaf, cut in enumerate(cuts):
        members = parts[leaf * LEAF : (leaf + 1) * LEAF]
        begun = add_up(part for _, part in members[:cut])
        assert begun is not None
        resumed += [(leaf * LEAF, begun), *members[cut:]]
    assert total(reversed(resumed)) == total(parts)


def test_a_failure_moves_nobody_to_another_leaf() -> None:
    """Leaves are positions, not ranks: without position 3, position 16 still opens the second leaf."""
    parts = [(i, part) for i, part in enumerate(draw(40)) if i != 3]
    assert total(parts) != total(enumerate(part for _, part in parts))
    result = leaf_sum(parts).total()
    assert result is not None
    assert torch.equal(vector(result.terms, "delta"), by_hand([(i, vector(part.terms, "delta")) for i, part in parts]))
    assert result.counted == 39


def test_a_sum_can_be_read_again_and_goes_on() -> None:
    parts = list(enumerate(draw(20)))
    sum_ = leaf_sum(parts[:10])
    assert bits(sum_.total()) == bits(sum_.total()) == total(parts[:10])
    for position, part in parts[10:]:
        sum_.add(position, part)
    assert bits(sum_.total()) == total(parts)


def test_no_part_no_sum() -> None:
    assert LeafSum().total() is None
    assert add_up([]) is None


def test_parts_are_never_changed() -> None:
    parts = draw(20)
    before = [bits(part) for part in parts]
    total(enumerate(parts))
    assert [bits(part) for part in parts] == before


def test_a_position_counts_once() -> None:
    sum_ = leaf_sum(enumerate(draw(2)))
    with pytest.raises(ValueError, match="position 1 was added twice"):
        sum_.add(1, draw(1)[0])


def test_terms_must_have_the_same_names() -> None:
    other = Contribution({"delta": torch.zeros(6)}, None, None, 1.0)
    with pytest.raises(KeyError, match="different terms"):
        leaf_sum([(0, draw(1)[0]), (1, other)]).total()
    with pytest.raises(KeyError, match="different terms"):
        leaf_sum([(0, draw(1)[0]), (16, other)]).total()


# --- the platform's own part of a contribution ----------------------------------------------------------------------


def test_buffers_average_by_examples_and_counters_take_the_maximum() -> None:
    """(30 · 1 + 10 · 5) / 40 = 2; whatever the strategy weighs by."""
    state = {"parameters": torch.zeros(1)}
    updates = [
        Update(torch.zeros(1), 30.0, buffers=torch.tensor([1.0, 2.0]), counters=torch.tensor([4, 9])),
        Update(torch.zeros(1), 10.0, buffers=torch.tensor([5.0, 2.0]), counters=torch.tensor([8, 3])),
    ]
    for strategy in (FedAvg(), FedAvg("uniform")):
        result = add_up(contribute(strategy, state, update, CONTEXT) for update in updates)
        assert result is not None and result.buffers is not None and result.counters is not None
        assert (result.examples, result.counted) == (40.0, 2)
        after = carry(Carried(torch.full((2,), 9.0), torch.tensor([100, 100])), result)
        assert after.buffers.tolist() == [2.0, 2.0]
        assert after.counters.tolist() == [8, 9]
        assert after.counters.dtype == torch.int64


def test_counters_are_exact_beyond_floats() -> None:
    """2⁵³ + 1 has no float64."""
    big = 2**53 + 1
    parts = [Contribution({}, None, torch.tensor([n]), 1.0) for n in (5, big, big - 1)]
    result = add_up(parts)
    assert result is not None and result.counters is not None
    assert result.counters.tolist() == [big]


def test_a_model_without_buffers_has_none() -> None:
    state = {"parameters": torch.zeros(1)}
    result = leaf_sum((i, contribute(FedAvg(), state, Update(torch.ones(1), 2.0), CONTEXT)) for i in range(3)).total()
    assert result is not None
    assert (result.buffers, result.counters, result.examples, result.counted) == (None, None, 6.0, 3)
    before = Carried(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert carry(before, result) == before


@pytest.mark.parametrize("examples", [0.0, -1.0, math.nan])
def test_buffers_that_have_no_mean(examples: float) -> None:
    """Clients that weigh the same may report no examples at all; their buffers then have no mean."""
    before = Carried(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RoundError, match="positive number"):
        carry(before, Contribution({}, torch.zeros(1), None, examples))
    after = carry(before, Contribution({}, None, torch.tensor([5]), examples))
    assert after == Carried(before.buffers, after.counters)
    assert after.counters.tolist() == [5]


def test_contribute_asks_the_strategy() -> None:
    update = Update(torch.tensor([2.0]), 3.0, tensors={"control": torch.tensor([7.0])})
    weighed = contribute(FedAvg(), {"parameters": torch.zeros(1)}, update, CONTEXT)
    assert (float(vector(weighed.terms, "delta")), weighed.terms["weight"], weighed.counted) == (6.0, 3.0, 1)
    control = contribute(Scaffold(), {"parameters": torch.zeros(1)}, update, CONTEXT)
    assert {name: float(vector(control.terms, name)) for name in control.terms} == {"delta": 2.0, "control": 7.0}
