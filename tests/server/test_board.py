"""What a server shows: asked over gRPC while clients do this and that."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import content_of, encode
from shoal.protos.fleet_pb2_grpc import BoardStub
from shoal.protos.messages import Failure
from shoal.protos.transport import CHUNK, MESSAGE, software
from shoal.server.board import ROWS, TROUBLES
from shoal.server.coordinator import Coordinator, Plan, start
from shoal.server.journal import Journal
from shoal.server.orders import Blob, Disk, Failed, Opened, Over, Recorded, Uncounted
from shoal.server.reporter import Reporter
from shoal.server.serving import Serving
from shoal.strategies.selectors import Uniform
from tests.server import asking
from tests.server.asking import an_order, packed
from tests.server.test_remote import INITIAL, STRATEGY, House, an_ask, an_update

if TYPE_CHECKING:
    from tests.server.conftest import Join, Serve

WAIT = 10.0
Look = Callable[[Serving], wire.StatusReply]
OPENED = Opened("run", "runs/0001-x", 3, 0, 2)


@pytest.fixture
def look() -> Iterator[Look]:
    """``look(serving)``: its status, over gRPC."""
    channels = list[grpc.Channel]()

    def ask(serving: Serving) -> wire.StatusReply:
        channels.append(grpc.insecure_channel(str(serving.address)))
        return BoardStub(channels[-1]).Status(wire.StatusRequest(), timeout=WAIT)

    yield ask
    for channel in channels:
        channel.close()


@pytest.fixture
def until(look: Look) -> Callable[[Serving, Callable[[wire.StatusReply], object]], wire.StatusReply]:
    """``until(serving, true)``: the first status of which that is true."""

    def wait(serving: Serving, true: Callable[[wire.StatusReply], object]) -> wire.StatusReply:
        ends = time.monotonic() + WAIT
        while not true(reply := look(serving)):
            assert time.monotonic() < ends, reply
        return reply

    return wait


@pytest.fixture
def house(serve: Serve) -> Iterator[House]:
    with ThreadPoolExecutor(1) as pool:
        yield House(serve(), pool)


def states(reply: wire.StatusReply) -> dict[str, str]:
    return {task.client: task.state for task in reply.tasks}


def test_nothing_goes_on_yet(serve: Serve, look: Look) -> None:
    reply = look(serve())

    assert (reply.software, reply.draining, reply.disk, reply.HasField("run")) == (software(), False, "", False)
    assert (reply.asked, reply.connected, list(reply.tasks), list(reply.troubles)) == (0, 0, [], [])
    assert 0 <= reply.uptime < WAIT


def test_what_is_no_request_is_said_so(serve: Serve) -> None:
    refused = pytest.raises(grpc.RpcError, match="the request is no StatusRequest")
    with grpc.insecure_channel(str(serve().address)) as channel, refused as caught:
        call: Any = channel.unary_unary("/shoal.fleet.v1.Board/Status")  # without serializers it takes bytes
        call(b"\xff", timeout=WAIT)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_each_client_is_shown_where_it_is(serve: Serve, join: Join, look: Look) -> None:
    serving = serve()
    peers = {name: join(serving, name) for name in ("idle", "beats", "fetches", "sends", "answers", "not asked")}
    header, payload = packed(CHUNK // 4)  # 8 bytes each: two chunks
    blob = Blob.of(b"the model")
    cohort = ["away", "idle", "beats", "fetches", "sends", "answers"]
    serving.tell(OPENED)
    nonces = asking.call(serving, an_order(serving, payload=blob, round=2), dict.fromkeys(cohort, 0))
    peers["beats"].beat(nonces["beats"])
    peers["fetches"].download(blob.sha256)
    peers["sends"].begin(nonces["sends"], header)
    peers["sends"].send([peers["sends"].piece(nonces["sends"], 0, payload[:CHUNK])])
    peers["answers"].answer(nonces["answers"], an_update())
    reply = look(serving)

    assert states(reply) == {
        **{"away": "asked", "idle": "asked", "beats": "training", "fetches": "training"},
        **{"sends": "uploading", "answers": "answered"},
    }
    assert [task.client for task in reply.tasks] == cohort
    assert dict(reply.run.states) == {"asked": 2, "training": 2, "uploading": 1, "answered": 1}
    assert [task.connected for task in reply.tasks] == [False, True, True, True, True, True]
    sends = reply.tasks[4]
    assert (sends.bytes_here, sends.bytes_total) == (CHUNK, 2 * CHUNK)
    assert 59 < sends.lease_left <= 60
    assert (reply.tasks[5].lease_left, reply.asked, reply.connected) == (0, 6, 6)
    assert {connection.client for connection in reply.connections} == set(peers)
    assert all(connection.peer.startswith("127.0.0.1:") for connection in reply.connections)
    assert (reply.run.round, reply.run.rounds, reply.run.phase) == (2, 3, "training")
    assert (reply.bytes_up, reply.bytes_down) == (CHUNK + content_of(encode(an_update())[0])[2], len(b"the model"))


def test_a_run_is_shown_from_its_first_wait_to_its_numbers(serve: Serve, look: Look) -> None:
    serving = serve()
    serving.tell(OPENED)
    waiting = look(serving).run
    assert (waiting.phase, waiting.wanted, waiting.folder, waiting.round) == ("waiting", 2, "runs/0001-x", 0)

    order = an_order(serving, ends=time.monotonic() + 30)
    asking.call(serving, order, {"a": 0})
    assert 29 < look(serving).run.deadline_in <= 30

    serving.call(serving.hub.end, order, "enough")
    serving.tell(Recorded(1, {"test_accuracy": 0.4, "test_loss": 1.0}))
    serving.tell(
        Recorded(2, {"test_accuracy": 0.5, "test_loss": math.nan, "train_seconds": 3.0, "clients_\x1b[2J": 1.0})
    )
    reply = look(serving)
    assert (reply.run.phase, dict(reply.run.metrics)) == ("summing", {"test_accuracy": 0.5})
    assert not reply.run.HasField("deadline_in")
    assert states(reply) == {"a": "withdrawn"}


def test_clients_with_orders_of_their_own_are_shown_together(serve: Serve, look: Look) -> None:
    serving = serve()
    serving.tell(OPENED)
    orders = {client: an_order(serving, round=2) for client in "ab"}
    for client, order in orders.items():
        asking.call(serving, order, {client: 0})
    serving.call(serving.hub.end, orders["a"], "enough")
    reply = look(serving)

    assert states(reply) == {"a": "withdrawn", "b": "asked"}
    assert (reply.asked, reply.run.phase, reply.run.round) == (2, "training", 2)
    asking.call(serving, an_order(serving, round=2), {"a": 0})
    assert states(look(serving)) == {"b": "asked", "a": "asked"}
    asking.call(serving, an_order(serving, round=3), {"a": 0})
    assert states(look(serving)) == {"a": "asked"}


def test_metrics_that_clients_name_are_bounded(serve: Serve, look: Look) -> None:
    serving = serve()
    serving.tell(OPENED)
    serving.tell(Recorded(1, {f"clients_{number}": 1.0 for number in range(999)}))
    serving.tell(Recorded(2, {"clients_" + "x" * 99: 1.0}))
    metrics = look(serving).run.metrics

    assert (len(metrics), max(map(len, metrics))) == (32, len("clients_31"))


def test_an_update_that_is_not_finite_is_shown_with_its_reason(house: House, join: Join, look: Look) -> None:
    peers = [join(house.serving, name) for name in "ab"]
    round = house.train(an_ask(["a", "b"]))
    bad = an_update(delta=np.full(5, np.nan, "float32"))
    assert peers[0].answer(peers[0].hear("offer").nonce, bad).status == wire.Receipt.REJECTED
    reply = look(house.serving)

    assert (reply.tasks[0].state, reply.tasks[0].connected) == ("rejected", True)
    assert "holds nan in its delta in tensor 'w'" in reply.tasks[0].reason
    (trouble,) = reply.troubles
    assert (trouble.client, trouble.round, trouble.state, trouble.reason) == ("a", 1, "rejected", reply.tasks[0].reason)
    peers[1].answer(peers[1].hear("offer").nonce, an_update())
    round.result(WAIT)


def test_a_clients_own_failure_is_shown(house: House, join: Join, look: Look) -> None:
    peer = join(house.serving)
    round = house.train(an_ask(["a"]))
    peer.answer(peer.hear("offer").nonce, Failure("a", 1, "its disk\n\x1b[2Jis full" + "!" * 1000, "a traceback"))
    round.result(WAIT)
    (trouble,) = look(house.serving).troubles

    assert (trouble.state, trouble.reason) == ("failed", "its disk  [2Jis full" + "!" * 280)


@pytest.mark.slow
def test_who_is_silent_is_overdue_and_then_lost(
    serve: Serve, join: Join, until: Callable[..., wire.StatusReply]
) -> None:
    serving = serve()
    join(serving)
    asking.call(serving, an_order(serving, lease=0.6), {"a": 0})
    overdue = until(serving, lambda reply: reply.tasks[0].overdue).tasks[0]
    lost = until(serving, lambda reply: reply.tasks[0].state == "lost")

    assert (overdue.state, overdue.silent_for > 0.3, overdue.lease_left < 0.3) == ("asked", True, True)
    assert "no sign of it for" in lost.troubles[0].reason
    assert not lost.tasks[0].overdue


@pytest.mark.slow
def test_who_has_not_answered_by_the_deadline_is_late(serve: Serve, until: Callable[..., wire.StatusReply]) -> None:
    serving = serve()
    asking.call(serving, an_order(serving, ends=time.monotonic()), {"a": 0})

    assert until(serving, lambda reply: reply.troubles).tasks[0].state == "late"


@pytest.mark.slow
def test_an_answer_that_the_journal_recalls_is_shown_as_answered(
    serve: Serve, join: Join, look: Look, tmp_path: Path
) -> None:
    ask = an_ask(["a", "b"])
    with ThreadPoolExecutor(2) as pool:
        first = House(serve(), pool, Journal(tmp_path / "kept"))
        rounds = [first.train(ask)]
        peers = {name: join(first.serving, name) for name in "ab"}
        nonces = {name: peer.hear("offer").nonce for name, peer in peers.items()}
        peers["a"].answer(nonces["a"], an_update())
        shutil.copytree(tmp_path / "kept", tmp_path / "killed")  # what a kill at this moment leaves
        second = House(serve(), pool, Journal(tmp_path / "killed"))
        rounds.append(second.train(ask))
        peer = join(second.serving, "b")
        peer.hear("offer")
        reply = look(second.serving)
        peers["b"].answer(nonces["b"], an_update())
        peer.answer(nonces["b"], an_update())
        for round, house in zip(rounds, (first, second), strict=True):
            round.result(WAIT)
            house.fleet.close()

    assert states(reply) == {"a": "answered", "b": "asked"}
    assert [task.connected for task in reply.tasks] == [False, True]


def test_an_answer_that_the_coordinator_cannot_count_is_no_success(serve: Serve, join: Join, look: Look) -> None:
    serving, peer = serve(), None
    nonces = asking.call(serving, an_order(serving), {"a": 0, "b": 0})
    for name in "ab":
        peer = join(serving, name)
        peer.answer(nonces[name], an_update() if name == "a" else Failure("b", 1, "why"))
    for name in "ab":
        serving.tell(Uncounted(Failure(name, 1, "it does not fit")))
    reply = look(serving)

    assert states(reply) == {"a": "rejected", "b": "failed"}
    assert [(trouble.client, trouble.reason) for trouble in reply.troubles] == [("a", "it does not fit"), ("b", "why")]


def test_a_full_disk_is_shown_until_it_takes_an_answer(
    serve: Serve, join: Join, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, peer = serve(), None
    nonce = asking.call(serving, an_order(serving), {"a": 0})["a"]
    peer = join(serving)
    with monkeypatch.context() as full:
        full.setattr("shoal.server.spool.SPARE", 2**62)
        with pytest.raises(grpc.RpcError, match="No space left"):
            peer.answer(nonce, an_update())
        refusing = look(serving)
    peer.answer(nonce, an_update())

    assert refusing.disk == f"No space left beside the {2**42} MiB that checkpoint and log may need"
    assert look(serving).disk == ""
    serving.tell(Disk("Input/output error"))
    assert look(serving).disk == "Input/output error"
    serving.tell(Disk(None))
    assert look(serving).disk == ""


@pytest.mark.slow
def test_of_a_crowd_those_are_named_that_need_attention(serve: Serve, look: Look) -> None:
    serving = serve()
    cohort = [f"{number:06}" + "🐟" * 194 for number in range(2 * ROWS)]
    nonces = asking.call(serving, an_order(serving), dict.fromkeys(cohort, 0))
    serving.call(lambda: serving.board.hear(Failed(nonces[cohort[-1]], Failure(cohort[-1], 1, "🐟" * 999))))
    for number in range(2 * TROUBLES):
        serving.tell(Failed("elsewhere", Failure(cohort[number], 1, "🐟" * 999)))
    reply = look(serving)

    assert (reply.asked, len(reply.tasks), len(reply.troubles)) == (2 * ROWS, ROWS, TROUBLES)
    assert reply.tasks[0].client == cohort[-1]
    assert reply.ByteSize() < MESSAGE


def test_a_watcher_that_fails_harms_nobody(
    serve: Serve, join: Join, look: Look, caplog: pytest.LogCaptureFixture, errors: list[str]
) -> None:
    def broken(news: object) -> None:
        raise KeyError("a defect")

    serving = serve()
    serving.watchers.insert(0, broken)
    join(serving).beat()

    assert look(serving).connected == 1
    assert "a watcher of the server has failed" in caplog.text
    serving.watchers.remove(broken)
    errors.clear()


@pytest.mark.slow
def test_a_coordinator_is_seen_at_work(house: House, join: Join, look: Look) -> None:
    seen, heard = list[wire.RunStatus](), list[object]()
    house.serving.watchers.append(heard.append)
    peers = [join(house.serving, name) for name in "ab"]
    plan, reporter = Plan(rounds=2, cohort=2), Reporter(house.serving)
    coordinator = Coordinator(
        plan, STRATEGY, Uniform(), house.fleet, start(STRATEGY, Uniform(), INITIAL), callbacks=[reporter]
    )
    house.serving.tell(OPENED)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(coordinator.run)
        for _ in range(2):
            offers = [peer.hear("offer") for peer in peers]
            seen.append(look(house.serving).run)
            for peer, offer in zip(peers, offers, strict=True):
                peer.answer(offer.nonce, an_update())
        running.result(WAIT)
    reply = look(house.serving)

    assert [(run.round, run.phase) for run in seen] == [(1, "training"), (2, "training")]
    assert (reply.run.round, reply.run.phase, dict(reply.run.metrics)) == (2, "summing", {"train_loss": 0.5})
    assert [news.round for news in heard if isinstance(news, Recorded)] == [1, 2]
    assert sum(isinstance(news, Over) for news in heard) == 2
    assert Disk(None) in heard  # a checkpoint was written
