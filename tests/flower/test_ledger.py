"""Numbers of an app, as a round's metrics."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import MetricRecord, RecordDict

from shoal.flower.ledger import numbers_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"loss": 1.5, "num-examples": 3}, {"train_loss": 1.5, "train_num_examples": 3.0}),
        ({"train_loss": 1.5}, {"train_loss": 1.5}),
        ({"loss": 1.0, "train_loss": 2.0}, {"train_loss": 1.0, "train_train_loss": 2.0}),
        ({"of": [1.0, 2.0]}, {}),
    ],
)
def test_a_prefix_is_given_once_and_no_number_is_lost(given: dict[str, Any], expected: dict[str, float]) -> None:
    assert numbers_of(MetricRecord(given), "train_") == expected


def test_all_metric_records_of_a_reply_count() -> None:
    reply = RecordDict({"a": MetricRecord({"loss": 1.0}), "b": MetricRecord({"acc": 0.5})})

    assert numbers_of(reply) == {"loss": 1.0, "acc": 0.5}
