"""What Shoal's two halves say to each other in Flower's messages.

======================  =============================================================================================
to a node
``arrays``              the model by name, as any ClientApp expects it
``shoal``               the strategy's own tensors
``config``              ``server-round``; ``shoal`` (1); ``shoal-counted``: the last round in which this node counted
back
``update``              ``delta``, and ``buffers`` and ``counters`` where the model has any, as vectors
``shoal``               the strategy's own tensors
``metrics``             ``num-examples``, ``steps``, ``lr-sum`` and what the client has measured
``client``              its name, its number in the experiment's data, and the hash of its model's layout
======================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from shoal.flower.vectors import record, tensors
from shoal.protos.errors import InvalidUpdate
from shoal.protos.messages import Sent, Update

__all__ = ["COUNTED", "OURS", "decode_sent", "decode_update", "encode_sent", "encode_update"]

OURS, COUNTED, SETTING = "shoal", "shoal-counted", "shoal-setting."
NUMBERS = {"num-examples": "examples", "steps": "steps", "lr-sum": "lr_sum"}


def encode_sent(
    arrays: ArrayRecord, extra: ArrayRecord, settings: Mapping[str, Any], config: dict[str, Any], counted: int
) -> RecordDict:
    """The message to one node; the records of the model and of the strategy's tensors may be shared by all."""
    named = {f"{SETTING}{name}": value for name, value in settings.items()}
    return RecordDict(
        {"arrays": arrays, OURS: extra, "config": ConfigRecord({**config, **named, OURS: 1, COUNTED: counted})}
    )


def decode_sent(content: RecordDict, parameters: Tensor) -> Sent[Tensor]:
    """What a strategy's client half gets; of a foreign strategy's message nothing but the parameters."""
    extra = tensors(content.array_records[OURS]) if OURS in content.array_records else {}
    config = content.config_records.get("config", ConfigRecord())
    settings: dict[str, Any] = {
        name.removeprefix(SETTING): value for name, value in config.items() if name.startswith(SETTING)
    }
    return Sent(parameters, extra, settings)


def encode_update(update: Update[Tensor], client: str, number: int, layout: str) -> RecordDict:
    """The reply of one node."""
    vectors = {"delta": update.delta}
    vectors |= {} if update.buffers is None else {"buffers": update.buffers}
    vectors |= {} if update.counters is None else {"counters": update.counters}
    numbers = {name: float(getattr(update, field)) for name, field in NUMBERS.items()}
    return RecordDict(
        {
            "update": record(vectors),
            OURS: record(update.tensors),
            "metrics": MetricRecord({**update.metrics, **numbers}),
            "client": ConfigRecord({"name": client, "number": number, "layout": layout}),
        }
    )


def decode_update(content: RecordDict) -> Update[np.ndarray]:
    """An update as it came, unchecked; InvalidUpdate if records are missing."""
    try:
        vectors = {name: array.numpy() for name, array in content.array_records["update"].items()}
        metrics: dict[str, Any] = dict(content.metric_records["metrics"])
        numbers = {field: metrics.pop(name) for name, field in NUMBERS.items()}
        own = {name: array.numpy() for name, array in content.array_records[OURS].items()}
        return Update(
            vectors["delta"],
            **numbers,
            tensors=own,
            buffers=vectors.get("buffers"),
            counters=vectors.get("counters"),
            metrics=metrics,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidUpdate(f"a reply is no update of Shoal's ({type(error).__name__}: {error})") from error
