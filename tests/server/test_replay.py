"""Calls that somebody has recorded, played again: nothing of them is counted, wherever and whenever."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.transport import SERVICE
from tests.server.test_remote import House, an_ask, an_update, bits, summed, total

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

WAIT = 10.0
GONE = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED}


@dataclass(frozen=True)
class Recording:
    """The bytes of one answer's three calls."""

    begin: bytes
    upload: bytes
    commit: bytes

    def play(self, peer: Peer) -> set[grpc.StatusCode]:
        """Each call once more, over the connection of ``peer``; how they ended."""
        channel: Any = peer.channel
        calls = [
            lambda: channel.unary_unary(f"/{SERVICE}/Begin")(self.begin, timeout=WAIT),
            lambda: channel.stream_unary(f"/{SERVICE}/Upload")(iter([self.upload]), timeout=WAIT),
            lambda: channel.unary_unary(f"/{SERVICE}/Commit")(self.commit, timeout=WAIT),
        ]
        return {_ended(call) for call in calls}

    def under(self, session: str) -> Recording:
        """The same answer with the token of another connection, as its own client could send it."""
        messages: list[Any] = [
            wire.BeginRequest.FromString(self.begin),
            wire.UploadRequest.FromString(self.upload),
            wire.CommitRequest.FromString(self.commit),
        ]
        for message in messages:
            message.session = session
        return Recording(*(message.SerializeToString() for message in messages))


def _ended(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def recorded(peer: Peer, nonce: str, number: int) -> Recording:
    """An answer is given, as a wire-tap hears it."""
    header, buffers = encode(an_update(number))
    begin = wire.BeginRequest(session=peer.session, nonce=nonce, header=header).SerializeToString()
    upload = peer.piece(nonce, 0, b"".join(buffers)).SerializeToString()
    commit = wire.CommitRequest(session=peer.session, nonce=nonce).SerializeToString()
    found = Recording(begin, upload, commit)
    assert found.play(peer) == {grpc.StatusCode.OK}
    return found


@pytest.fixture
def house(serve: Serve) -> Iterator[House]:
    with ThreadPoolExecutor(1) as pool:
        yield House(serve(), pool)


def played(house: House, peers: Sequence[Peer], round: int) -> tuple[list[Recording], Any, Any]:
    """A round of those clients, recorded: the tape, the sum's bits and those that it must have."""
    names = [peer.client for peer in peers]
    ask = an_ask(names, round)
    running = house.train(ask)
    tape = [recorded(peer, peer.hear("offer").nonce, number) for number, peer in enumerate(peers)]
    expected = summed(ask, {number: an_update(number) for number in range(len(peers))})
    return tape, bits(total(running.result(WAIT))), bits(expected)


@pytest.mark.fault(7, 12)
def test_an_answer_of_an_old_round_is_not_counted_in_the_next(house: House, join: Join) -> None:
    peers = [join(house.serving, name) for name in "ab"]
    tape, *first = played(house, peers, 1)
    ask = an_ask(["a", "b"], 2)
    running = house.train(ask)
    nonces = [peer.hear("offer").nonce for peer in peers]
    ended = [recording.play(peer) for recording in tape for peer in peers]
    for number, (peer, nonce) in enumerate(zip(peers, nonces, strict=True)):
        recorded(peer, nonce, number + 5)

    assert first[0] == first[1]
    assert ended == [{grpc.StatusCode.NOT_FOUND}] * 4
    assert bits(total(running.result(WAIT))) == bits(summed(ask, {0: an_update(5), 1: an_update(6)}))


@pytest.mark.fault(7)
def test_calls_of_a_connection_that_is_over_are_nobodys(house: House, join: Join) -> None:
    first = join(house.serving)
    tape, *_ = played(house, [first], 1)
    first.leave()
    again = join(house.serving, instance="after a restart")
    running = house.train(an_ask(["a"], 2))
    nonce = again.hear("offer").nonce

    assert tape[0].play(again) == {grpc.StatusCode.UNAUTHENTICATED}
    assert tape[0].under(again.session).play(again) == {grpc.StatusCode.NOT_FOUND}
    recorded(again, nonce, 3)
    assert bits(total(running.result(WAIT))) == bits(summed(an_ask(["a"], 2), {0: an_update(3)}))


@pytest.mark.fault(7)
def test_a_recording_is_of_no_use_to_another_client(house: House, join: Join) -> None:
    """Not even in the round that it was made in, and with a connection of one's own."""
    owner, thief = join(house.serving, "owner"), join(house.serving, "thief")
    ask = an_ask(["owner", "thief"])
    running = house.train(ask)
    recording = recorded(owner, owner.hear("offer").nonce, 0)

    assert recording.under(thief.session).play(thief) == {grpc.StatusCode.NOT_FOUND}
    recorded(thief, thief.hear("offer").nonce, 1)
    assert bits(total(running.result(WAIT))) == bits(summed(ask, {0: an_update(0), 1: an_update(1)}))


@pytest.mark.fault(7)
def test_a_recording_of_another_run_is_not_counted(serve: Serve, join: Join, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = House(serve(), pool), House(serve(), pool)
        tape, *_ = played(one, [join(one.serving)], 1)
        peer, ask = join(other.serving), an_ask(["a"])
        running = other.train(ask)
        nonce = peer.hear("offer").nonce
        ended = tape[0].play(peer) | tape[0].under(peer.session).play(peer)
        recorded(peer, nonce, 9)

        assert ended == GONE
        assert bits(total(running.result(WAIT))) == bits(summed(ask, {0: an_update(9)}))
