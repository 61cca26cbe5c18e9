"""The program that plays a device's ClientApp: a process of its own, which may be lost; see :mod:`shoal.client.worker`.

It is told in JSON lines where a message lies and where its answer goes. The node's state lies in files, each with the
number of the message that left it; which one is true the server says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from shoal.client.process import answer_jobs
from shoal.client.store import Outbox, keep_state, kept_state
from shoal.flower.app import FlowerApp
from shoal.flower.compat import identify, to_wire
from shoal.flower.drawing import seed_all
from shoal.flower.envelopes import Terms, asked_in, envelope_of
from shoal.flower.turns import play
from shoal.protos.codec import decode_envelope, encode
from shoal.protos.errors import DataError, ShoalError
from shoal.protos.files import mapped
from shoal.protos.messages import Envelope, Failure

__all__ = ["main"]

OLDER = 6  # states before the true one that are kept: a server that goes on after a round asks its messages again
LOADED = ExitStack()  # what makes the app's modules importable, as long as the process lives


def main() -> None:
    """Answer jobs until the other side is gone."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    answer_jobs(lambda job: _look(job) if job["kind"] == "look" else _play(job))


def _look(job: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of the app; the reason if it cannot be loaded."""
    try:
        app = FlowerApp.read(job["data"]["app"])
        _client_app(job["data"]["app"])
    except ShoalError as error:
        return {"error": str(error)}
    except BaseException as error:
        return {"error": f"the ClientApp cannot be loaded: {type(error).__name__}: {error}"}
    return {"about": f"Flower app {app.name} {app.version}"}


@lru_cache(maxsize=1)
def _client_app(path: str) -> ClientApp:
    app = FlowerApp.read(path)
    LOADED.enter_context(app.importable())
    found: ClientApp = app.client_app()
    return found


def _play(job: Mapping[str, Any]) -> dict[str, Any]:
    """One message from its files to its answer's; whatever goes wrong in it is the answer."""
    try:
        header, payload = encode(_answer(job))
    except (Exception, SystemExit) as error:
        told = Failure(job["client"], int(job["round"]), f"{type(error).__name__}: {error}")
        header, payload = encode(told.sendable())
    Outbox(Path(job["outbox"])).put(job["nonce"], header, payload)
    return {}


def _answer(job: Mapping[str, Any]) -> Envelope | Failure:
    states, counted = Path(job["states"]), int(job["counted"])
    envelope = decode_envelope(Path(job["task"]).read_bytes(), mapped(Path(job["payload"])), verify=False)
    terms = Terms.decode(Path(job["assignment"]).read_bytes())
    turn, content = asked_in(envelope, terms, job["data"]["config"], _state(states, counted))
    identify(terms.run)
    app = _client_app(job["data"]["app"])
    seed_all(turn.seed)
    answer = play(app, turn, content)
    if answer.state is None:
        return Failure(job["client"], turn.round, answer.reason, answer.traceback).sendable()
    found = envelope_of(answer, turn.round)
    keep_state(states, counted + 1, to_wire(answer.state))  # before the answer: one that is taken finds its state
    return found


def _state(states: Path, counted: int) -> bytes:
    """The node's true state; an error if it had one and it is gone."""
    kept = kept_state(states, counted, OLDER)
    if counted and kept is None:
        raise DataError(
            f"this device's state after its message {counted} of the run is not in {states}; start it with the --state "
            f"folder it had"
        )
    return kept or b""
