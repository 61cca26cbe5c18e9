"""Who is there, who is gone, and whose task has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.transport import CHUNK
from shoal.server import hub
from shoal.server import serving as serving_module
from shoal.server.orders import Failed, Joined, Left, Session
from shoal.server.serving import Serving
from tests.server.asking import BIG, Status, Wait, an_update, ask, refused, slowly

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

WAIT = 10.0


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks for those who are gone all the time."""
    monkeypatch.setattr(serving_module, "TICK", 0.01)


def test_a_second_process_of_the_same_name_replaces_the_first(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    first = join(serving)
    ask(serving)
    nonce = first.hear("offer").nonce
    second = join(serving, instance="two")
    goodbye = first.hear("goodbye")

    assert (goodbye.advice, "another process" in goodbye.reason) == (wire.Goodbye.REPLACED, True)
    assert second.hear("offer").nonce == nonce
    assert refused(lambda: first.commit(nonce))[0] == Status.UNAUTHENTICATED
    assert second.answer(nonce, an_update()).status == wire.Receipt.ACCEPTED


def test_a_connection_that_a_newer_one_of_its_process_takes_over_is_not_told_to_stay_away(
    serve: Serve, join: Join
) -> None:
    serving = serve()
    first = join(serving)
    join(serving)

    assert first.hear("goodbye").advice == wire.Goodbye.COME_BACK


def test_an_upload_of_a_process_that_was_replaced_ends(
    begun: tuple[Serving, Peer, str], join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, first, nonce = begun
    monkeypatch.setattr("shoal.server.intake.BATCH", 1)
    writing, go = slowly(monkeypatch, "shoal.server.spool.Incoming._write")
    pieces = [first.piece(nonce, at, BIG[1][at : at + CHUNK]) for at in range(0, len(BIG[1]), CHUNK)]
    call = first.stub.Upload.future(iter(pieces))
    assert writing.wait(WAIT)
    second = join(serving, instance="two")
    go.set()

    assert refused(lambda: call.result(WAIT))[0] == Status.UNAUTHENTICATED
    assert second.begin(nonce, BIG[0]) in (CHUNK, 2 * CHUNK)  # the second chunk may have come before the other process


def test_one_who_leaves_is_told_of_once(serve: Serve, join: Join, event: Wait) -> None:
    serving = serve()
    peer = join(serving)
    event(serving, Joined)
    peer.leave()

    assert event(serving, Left).client == "a"
    assert serving.events.empty()
    assert refused(lambda: peer.begin("", b""))[0] == Status.UNAUTHENTICATED


@pytest.mark.fault(5)
def test_a_client_without_a_heartbeat_is_dropped(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve(heartbeat=0.01)
    peer = join(serving)

    assert event(serving, Left).reason.startswith("no heartbeat for ")
    assert peer.hear("goodbye").advice == wire.Goodbye.COME_BACK
    assert serving.call(lambda: list(serving.hub.present)) == []


@pytest.mark.fault(2)
def test_a_lease_ends_without_a_sign(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving, lease=0.01)
    failed = event(serving, Failed)

    assert ("was lost: no sign of it" in failed.failure.reason, failed.failure.kind) == (True, "lost")
    assert peer.hear("withdrawal").nonce == failed.nonce


@pytest.mark.slow
@pytest.mark.fault(5)
def test_only_the_task_that_a_heartbeat_names_is_kept(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving, lease=0.1)
    busy = peer.hear("offer").nonce
    end = time.monotonic() + 0.25
    while time.monotonic() < end:
        peer.beat(busy)

    assert [e for e in _drained(serving) if isinstance(e, Failed)] == []
    failing = threading.Event()

    def idle() -> None:
        while not failing.is_set():
            peer.beat()

    thread = threading.Thread(target=idle)
    thread.start()
    try:
        assert event(serving, Failed).nonce == busy
    finally:
        failing.set()
        thread.join(WAIT)


def _drained(serving: Serving) -> Iterator[object]:
    while not serving.events.empty():
        yield serving.events.get()


@pytest.mark.fault(24)
def test_a_deadline_ends_the_task_of_one_who_is_alive(serve: Serve, join: Join, event: Wait, quick_ticks: None) -> None:
    serving = serve()
    peer = join(serving)
    ask(serving, ends=0.0)

    failure = event(serving, Failed).failure

    assert ("before the deadline" in failure.reason, failure.kind) == (True, "late")
    assert peer.hear("withdrawal").reason == "client 'a' did not answer before the deadline"


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_that_cost_nothing_are_forgotten_when_there_are_too_many(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that are proven, there, or have a task: of the others the oldest."""
    monkeypatch.setattr(hub, "MOST", 5)
    serving = serve()

    def come(client: str, identity: str = "") -> Session:
        hello = wire.Hello(versions=[1], client=client, instance=client)
        return serving.call(serving.hub.join, hello, identity, "nowhere")

    staying = [come("busy"), come("proven", "north"), come("here")]
    ask(serving, "busy")
    for session in staying[:2]:
        serving.call(serving.hub.leave, session, "tired")
    for number in range(10):
        serving.call(serving.hub.leave, come(f"invented {number}"), "tired")

    known, seen = serving.call(lambda: (list(serving.hub.known), list(serving.hub._seen)))
    assert known == seen == ["busy", "proven", "here", "invented 8", "invented 9"]
