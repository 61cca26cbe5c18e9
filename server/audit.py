"""The audit log of a served run, ``audit.jsonl``: whose updates made each round's model. A line a round, chained.

::

    {"round": 2, "time": …, "before": HASH, "after": HASH, "clients": […], "previous": HASH, "sha256": HASH}

``before`` and ``after`` are of the global parameters (:func:`digest`). ``clients`` has the cohort in its order, each
with its ``client`` name, the ``identity`` that its certificate proved (null without TLS) and the ``nonce`` of its task;
then either the ``sha256`` of its update's payload and its ``examples``, if it was counted, or the ``reason`` why not.
A line's ``sha256`` is of the line without it, ``previous`` that of the line before, and in the first line
:func:`origin`. So no byte can be changed, and no line removed, added or moved, unless all that follow are made anew.

A line is on the disk before the checkpoint of its round, and is made from what the journal and that checkpoint say: a
server that is killed in between makes the round again from the same answers, and its line with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shoal.protos.codec import content_of, decode_update
from shoal.protos.errors import RunError
from shoal.protos.messages import Failure
from shoal.protos.parameters import Parameters
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Round
from shoal.server.log import now
from shoal.server.remote import Member
from shoal.server.runs import RunFolder, plain

__all__ = ["NAME", "Audit", "Misfit", "digest", "entries", "origin", "owners", "seal"]

NAME = "audit.jsonl"
OVER = "the round was over without it"
SEAL = ', "sha256": "'
FIELDS = {"round", "time", "before", "after", "clients", "previous"}
MEMBER = {"client", "identity", "nonce"}


class Misfit(RunError):
    """A line of an audit log that does not fit; ``line`` counts from 1."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line} {why}")
        self.line = line


def digest(parameters: Parameters[Tensor]) -> str:
    """SHA-256 of the bytes of the trainable vector, the buffers and the counters, in this order, little-endian."""
    found = hashlib.sha256()
    for tensor in (parameters.trainable, parameters.buffers, parameters.counters):
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        found.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return found.hexdigest()


def origin(run: str) -> str:
    """What the first line follows: SHA-256 of the run's name to its clients, so that it is of this run and no other."""
    return hashlib.sha256(run.encode()).hexdigest()


class Audit(Callback):
    """A callback that writes ``audit.jsonl``; it must hear of checkpoints first.

    The run goes on from ``point``; ``members`` gives a round's cohort. That a round has ended is told to the log, too.
    """

    def __init__(
        self, folder: RunFolder, run: str, point: Checkpoint, members: Callable[[int], Sequence[Member]]
    ) -> None:
        self._folder, self._members = folder, members
        self._before, self._previous = digest(point.parameters), _last(folder.path / NAME) or origin(run)
        self._failures: Sequence[Failure] = ()

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self._failures = round.failures
        if round.number:
            told = {name: round.numbers[name] for name in ("counted", "failed", "seconds")}
            self._folder.log("round", round=round.number, **told)

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        number, after = checkpoint.round, digest(checkpoint.parameters)
        if number == 0:  # stopped before the first round
            return
        reasons = {failure.client: failure.reason for failure in self._failures if failure.round == number}
        counted = {client for client, round in checkpoint.clients.items() if round == number}
        clients = [_told(member, member.client in counted, reasons) for member in self._members(number)]
        content = {"round": number, "time": now(), "before": self._before, "after": after, "clients": clients}
        line, sha256 = seal(content | {"previous": self._previous})
        self._folder.append_synced(NAME, line)
        self._before, self._previous = after, sha256


def _told(member: Member, counted: bool, reasons: Mapping[str, str]) -> dict[str, Any]:
    told = {"client": member.client, "identity": member.identity or None, "nonce": member.nonce}
    if not counted or member.header is None:
        return {**told, "reason": reasons.get(member.client, OVER)}
    examples = decode_update(member.header, None, verify=False).examples
    return {**told, "sha256": content_of(member.header)[1].hex(), "examples": examples}


def seal(content: Mapping[str, Any]) -> tuple[bytes, str]:
    """The line of that content, and its SHA-256, with which it ends."""
    text = json.dumps(plain(content))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]}{SEAL}{sha256}"}}\n'.encode(), sha256


def _last(path: Path) -> str | None:
    """The SHA-256 with which the last line ends."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        last = deque(file, maxlen=1)
    return last[0][-67:-3].decode(errors="replace") if last else None


def owners(path: Path) -> dict[str, str]:
    """With which identities the clients took part, the first of each that was proven; damaged lines are passed over."""
    found = dict[str, str]()
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    for told in json.loads(line)["clients"]:
                        if told["identity"] is not None:
                            found.setdefault(told["client"], told["identity"])
    return found


# --- verifying --------------------------------------------------------------------------------------------------------


def entries(path: Path, run: str) -> Iterator[dict[str, Any]]:
    """The lines in their order, each checked by itself and against the one before.

    Misfit at the first that does not fit. What this cannot know is whether lines are missing at the end, and whether
    all were made anew.
    """
    previous, before = origin(run), None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            entry = _opened(number, line)
            if entry["previous"] != previous:
                what = f"line {number - 1}" if number > 1 else f"the beginning of run {run}"
                raise Misfit(number, f"does not follow {what}: lines were removed, added or moved, or all made anew")
            if entry["round"] != number or before not in (None, entry["before"]):
                raise Misfit(number, f"is of round {entry['round']} and does not go on where line {number - 1} ended")
            previous, before = entry["sha256"], entry["after"]
            yield entry


def _opened(number: int, line: bytes) -> dict[str, Any]:
    """What a line says, if it is as it was written."""
    if not line.endswith(b"\n"):
        raise Misfit(number, "does not end: it was cut, or torn by a crash (a run that goes on drops such a line)")
    text, _, rest = line.rpartition(SEAL.encode())
    text += b"}"
    sha256 = hashlib.sha256(text).hexdigest()
    if rest != f'{sha256}"}}\n'.encode():
        raise Misfit(number, "was changed: its SHA-256 is not that of what it says")
    try:
        entry = json.loads(text)
        clients = [told.keys() - MEMBER for told in entry["clients"]]
        if entry.keys() != FIELDS or any(told not in ({"sha256", "examples"}, {"reason"}) for told in clients):
            raise ValueError("its fields are others")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Misfit(number, f"is no line of an audit log: {error}") from error
    return {**entry, "sha256": sha256}
