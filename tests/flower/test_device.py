"""The program on a device: whose state goes with which message, and what it answers when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from shoal.flower import device
from shoal.flower.compat import context, from_wire, identify, name_message
from shoal.flower.envelopes import Terms, header_for, packed
from shoal.flower.turns import Turn, array_record
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import decode_envelope, decode_failure, encode
from shoal.protos.messages import Update
from tests.flower.conftest import APPS


@dataclass
class Play:
    """Plays messages on a device in ``folder``, numbered as the server would."""

    folder: Path
    app: str = "stateful"
    config: dict[str, Any] | None = None

    def job(self, counted: int, nonce: str) -> dict[str, Any]:
        """A message to train in round 2, of a model of two zeros."""
        for name in ("states", "outbox"):
            (self.folder / name).mkdir(exist_ok=True)
        identify(1)
        message = Message(RecordDict({"arrays": array_record({"w": np.zeros(2)}), "config": round_2()}), 7, "train")
        name_message(message, "m")
        header, payload = packed(message.content)
        turn = Turn(message.metadata, context(1, 7, {}, {}), 5, 2)
        (self.folder / "task").write_bytes(header_for(turn, header, 1))
        (self.folder / "payload").write_bytes(b"".join(payload))
        (self.folder / "assignment").write_bytes(Terms(1, self.app, 4, {"how": "raise", "result": ""}).encode())
        paths = {name: str(self.folder / name) for name in ("assignment", "task", "payload", "states", "outbox")}
        about = {"kind": "play", "client": "a", "round": 2, "allow": [], "device": "cpu"}
        data = {"app": str(APPS / self.app), "config": self.config or {}}
        return {**about, **paths, "data": data, "nonce": nonce, "counted": counted}

    def __call__(self, counted: int = 0, nonce: str = "n") -> wire.Header:
        assert device._play(self.job(counted, nonce)) == {}
        return wire.Header.FromString(self._outbox(nonce, "header"))

    def _outbox(self, nonce: str, part: str) -> bytes:
        return (self.folder / "outbox" / f"{nonce}.{part}").read_bytes()

    def rounds(self, nonce: str = "n") -> int:
        """How many messages the app has counted in its state, as its answer says."""
        envelope = decode_envelope(self._outbox(nonce, "header"), self._outbox(nonce, "payload"))
        return int(str(from_wire(envelope.content.tobytes())["metrics"]["rounds"]))

    def reason(self, nonce: str = "n") -> str:
        return decode_failure(self._outbox(nonce, "header")).reason


def round_2() -> ConfigRecord:
    return ConfigRecord({"server-round": 2})


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    yield Play(tmp_path)
    device.LOADED.close()
    device._client_app.cache_clear()


def test_only_an_answer_that_was_taken_moves_the_state(play: Play) -> None:
    play(0)
    assert play.rounds() == 1
    play(0)  # nobody took it
    assert play.rounds() == 1
    play(1)
    assert play.rounds() == 2
    play(2)
    play(2)
    assert play.rounds() == 3


def test_a_state_that_is_gone_is_said_to_be_gone(play: Play) -> None:
    play(3)

    assert "DataError: this device's state after its message 3 of the run is not in" in play.reason()


def test_what_the_device_says_of_itself_wins(play: Play) -> None:
    play.app, play.config = "averaging", {"partition-id": 40}
    play.job(0, "n")
    assert "KeyError" in play(0).failure.reason  # the app wants a learning rate
    play.app, play.config = "failing", {"partition-id": 1}
    device._client_app.cache_clear()

    failure = play(0).failure
    assert (failure.client, failure.round, failure.reason) == ("a", 2, "ValueError: no data today")
    assert 'raise ValueError("no data today")' in failure.traceback


def test_a_failure_leaves_the_state_as_it_was(play: Play) -> None:
    play(0)
    play.app, play.config = "failing", {"partition-id": 1}
    device._client_app.cache_clear()
    play(1)
    assert sorted(path.name for path in (play.folder / "states").iterdir()) == ["00001"]


def test_a_task_of_shoals_own_is_a_failure_in_words(play: Play) -> None:
    job = play.job(0, "n")
    header, _ = encode(Update(np.zeros(1), 1))
    Path(job["task"]).write_bytes(header)
    device._play(job)

    assert "expected a header with envelope, got update" in play.reason()


def test_a_look_loads_the_app(play: Play, tmp_path: Path) -> None:
    assert device._look(play.job(0, "n")) == {"about": "Flower app stateful 1.0.0"}
    device._client_app.cache_clear()
    (tmp_path / "app.py").write_text("client = 1\nraise ImportError('no such driver')\n")
    (tmp_path / "pyproject.toml").write_text((APPS / "stateful" / "pyproject.toml").read_text())
    found = device._look({"data": {"app": str(tmp_path)}})

    assert "cannot be loaded: ImportError: no such driver" in found["error"]
