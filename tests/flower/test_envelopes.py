"""What a device sends may be anything: it is a reply for the strategy, or an error of Shoal's that says why not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from shoal.flower.compat import context, identify, name_message, to_wire
from shoal.flower.envelopes import Terms, answer_in, counted_in
from shoal.flower.turns import Turn, array_record
from shoal.protos.errors import CodecError, InvalidUpdate
from shoal.protos.messages import Envelope


@pytest.fixture
def turn() -> Turn:
    identify(1)
    message = Message(RecordDict(), 7, "train")
    name_message(message, "m")
    return Turn(message.metadata, context(1, 7, {}, {}), 5, 2)


def a_reply() -> bytes:
    arrays, metrics = array_record({"w": np.arange(4.0)}), MetricRecord({"num-examples": 3, "loss": [0.5, 1.0]})
    return to_wire(RecordDict({"arrays": arrays, "metrics": metrics, "c": ConfigRecord({"b": True, "x": b"y"})}))


def test_whatever_bytes_come_there_is_an_answer_or_a_reason(turn: Turn) -> None:
    rng, refused = random.Random(0), 0
    for _ in range(600):
        data = bytearray(a_reply())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            answer = answer_in(Envelope(2, np.frombuffer(bytes(data[: rng.choice([len(data), 40])]), np.uint8)), turn)
            assert answer.reply.metadata.dst_node_id == turn.metadata.src_node_id
        except InvalidUpdate as error:
            refused += 1
            assert str(error)

    assert 100 < refused < 600


def test_an_undamaged_reply_moves_the_state_by_one(turn: Turn) -> None:
    answer = answer_in(Envelope(2, np.frombuffer(a_reply(), np.uint8)), turn)

    assert answer.state is not None and counted_in(answer.state) == 1
    assert answer.reply.content.metric_records["metrics"]["loss"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"run": 1, "app": "a", "nodes": 2, "config": {"x": [1]}}', b"\xff"]
)
def test_what_is_no_assignment_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError, match="the run"):
        Terms.decode(data)


def test_an_assignment_comes_back() -> None:
    terms = Terms(2**62, "app", 3, {"a": 0.1, "b": True, "c": "x", "d": 7, "e": float("inf")})

    assert Terms.decode(terms.encode()) == terms
