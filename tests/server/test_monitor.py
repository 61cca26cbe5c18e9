"""Metrics and health over HTTP, asked as Prometheus and a probe do."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.messages import Failure, Kind, Measurement
from shoal.protos.transport import Address
from shoal.server.monitor import CALLERS, Monitor
from shoal.server.orders import Opened, Recorded
from shoal.server.serving import Serving
from tests.server.asking import an_order, call
from tests.server.test_remote import House, an_ask, an_update

if TYPE_CHECKING:
    from tests.server.conftest import Join, Serve

WAIT = 10.0
LOOPBACK = Address("127.0.0.1", 0)


@pytest.fixture
def serving(serve: Serve) -> Serving:
    return serve()


@pytest.fixture
def monitor(serving: Serving) -> Iterator[Monitor]:
    monitor = Monitor(LOOPBACK, serving)
    yield monitor
    monitor.close()


def get(monitor: Monitor, path: str, method: str = "GET") -> tuple[int, str, str]:
    """The status, the content's type and the content."""
    connection = http.client.HTTPConnection(monitor.address.host, monitor.address.port, timeout=WAIT)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read().decode()
    finally:
        connection.close()


def health(monitor: Monitor) -> tuple[int, Any]:
    status, kind, text = get(monitor, "/healthz")
    assert kind == "application/json"
    return status, json.loads(text)


def metrics(monitor: Monitor) -> dict[str, float]:
    """Every sample by its name and the values of its labels."""
    status, kind, text = get(monitor, "/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    families = text_string_to_metric_families(text)
    return {"/".join([s.name, *map(str, s.labels.values())]): s.value for family in families for s in family.samples}


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_every_series_is_there_before_anything_happens(monitor: Monitor) -> None:
    found = {name: value for name, value in metrics(monitor).items() if name.startswith("shoal_")}

    assert set(found.values()) == {0}
    assert {"shoal_answers_total/accepted/train", "shoal_answers_total/lost/evaluate"} < found.keys()
    assert not any(name.endswith("_created") for name in found)


def test_a_round_is_counted(serving: Serving, monitor: Monitor, join: Join) -> None:
    peers = {name: join(serving, name) for name in "abc"}
    with ThreadPoolExecutor(1) as pool:
        house = House(serving, pool)
        training = house.train(an_ask(["a", "b", "c"]))
        nonces = {name: peer.hear("offer").nonce for name, peer in peers.items()}
        peers["a"].answer(nonces["a"], an_update())
        assert peers["a"].commit(nonces["a"]).status == wire.Receipt.DUPLICATE
        bad = an_update(delta=np.full(5, np.nan, "float32"))
        assert peers["b"].answer(nonces["b"], bad).status == wire.Receipt.REJECTED
        peers["c"].answer(nonces["c"], Failure("c", 1, "no"))
        training.result(WAIT)
        evaluating = house.evaluate(an_ask(["a"]))
        peers["a"].answer(peers["a"].hear("offer").nonce, Measurement({"loss": 1.0, "examples": 3}))
        evaluating.result(WAIT)
    serving.tell(Recorded(0, {"test_loss": 1.0}))
    serving.tell(Recorded(1, {"counted": 1.0, "seconds": 5.0}))
    serving.call(lambda: None)
    found = metrics(monitor)

    outcomes = {name: v for name, v in found.items() if name.startswith("shoal_answers_total") and v}
    assert outcomes == {
        "shoal_answers_total/accepted/train": 1,
        "shoal_answers_total/duplicate/train": 1,
        "shoal_answers_total/rejected/train": 1,
        "shoal_answers_total/failed/train": 1,
        "shoal_answers_total/accepted/evaluate": 1,
    }
    assert (found["shoal_rounds_total"], found["shoal_updates_counted_total"]) == (1, 1)
    assert (found["shoal_round_seconds_sum"], found["shoal_round_seconds_bucket/10.0"]) == (5, 1)
    assert found["shoal_commit_seconds_count"] == 2
    assert 0 < found["shoal_commit_seconds_sum"] < WAIT
    assert found["shoal_bytes_total/up"] == 2 * (5 * 4 + 2 * 4 + 8)  # of a and b: delta, buffers and counters
    assert (found["shoal_clients_connected"], found["shoal_clients_joined_total"]) == (3, 3)


def test_a_lease_and_a_deadline_that_end_are_counted(serving: Serving, monitor: Monitor) -> None:
    serving.tell(Opened("run", "runs/1", 7, 2, 1))
    call(serving, an_order(serving, round=3, lease=0.0), {"a": 0})
    serving.call(serving.hub.tick)
    call(serving, an_order(serving, round=3, ends=0.0, kind=Kind.EVALUATE), {"a": 0})
    serving.call(serving.hub.tick)
    found = metrics(monitor)

    assert (found["shoal_answers_total/lost/train"], found["shoal_answers_total/late/evaluate"]) == (1, 1)
    assert (found["shoal_round"], found["shoal_rounds_planned"]) == (3, 7)


def test_the_format_is_the_one_that_is_asked_for(monitor: Monitor) -> None:
    body, kind = monitor.metrics("application/openmetrics-text; version=1.0.0")

    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


# --- health -----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_well(serving: Serving, monitor: Monitor) -> None:
    assert health(monitor) == (200, {"ok": True, "reason": "", "draining": False})
    serving.drain()
    assert health(monitor) == (200, {"ok": True, "reason": "", "draining": True})


def test_a_disk_that_takes_no_more(
    serving: Serving, monitor: Monitor, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonce = call(serving, an_order(serving), {"a": 0})["a"]
    peer = join(serving)
    with monkeypatch.context() as full:
        full.setattr("shoal.server.spool.SPARE", 2**62)
        with pytest.raises(grpc.RpcError, match="No space left"):
            peer.answer(nonce, an_update())
    reason = f"the disk takes no more: No space left beside the {2**42} MiB that checkpoint and log may need"
    assert health(monitor) == (503, {"ok": False, "reason": reason, "draining": False})
    refusing = metrics(monitor)
    peer.answer(nonce, an_update())

    assert (refusing["shoal_disk_refusals_total"], refusing["shoal_disk_refusing"]) == (1, 1)
    assert health(monitor)[0] == 200
    assert metrics(monitor)["shoal_disk_refusing"] == 0


def test_an_event_loop_that_hangs(serving: Serving, monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.server.monitor.PATIENCE", 0.1)
    go = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(serving.call, go.wait, WAIT)
        while not hanging.running():
            pass
        found = health(monitor)
        assert metrics(monitor)["shoal_clients_connected"] == 0
        go.set()
        assert hanging.result(WAIT)

    assert found == (503, {"ok": False, "reason": "the event loop does not answer within 0.1 s"})
    assert health(monitor)[0] == 200


def test_a_coordinator_that_has_ended(serving: Serving) -> None:
    made = list[Monitor]()
    coordinator = threading.Thread(target=lambda: made.append(Monitor(LOOPBACK, serving)))
    coordinator.start()
    coordinator.join()
    try:
        found = health(made[0])
    finally:
        made[0].close()

    assert found == (503, {"ok": False, "reason": "the coordinator's thread has ended", "draining": False})


# --- the door ---------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_clear_sentence(serving: Serving, monitor: Monitor) -> None:
    with pytest.raises(ConnectionRefused, match=r"cannot show metrics at 127\.0\.0\.1:\d+ \(Address already in use\)"):
        Monitor(monitor.address, serving)
    with pytest.raises(ConnectionRefused, match=r"nowhere\.invalid.*choose another address with --http"):
        Monitor(Address("nowhere.invalid", 80), serving)


def test_it_listens_on_ipv6_too(serving: Serving) -> None:
    try:
        monitor = Monitor(Address("::1", 0), serving)
    except ConnectionRefused:
        pytest.skip("this machine has no IPv6")
    assert health(monitor)[0] == 200
    monitor.close()


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/", "GET", 404), ("/metrics/x", "GET", 404), ("/", "PUT", 501)]
)
def test_there_is_nothing_else(monitor: Monitor, path: str, method: str, status: int) -> None:
    assert get(monitor, path, method)[0] == status


@pytest.mark.parametrize("words", [b"", b"\x16\x03\x01\xff\xfe\r\n", b"GET /metrics HTTP/1.1\r\nHost", b"GET\r\n\r\n"])
def test_callers_who_do_not_speak_or_hang_up_disturb_nobody(
    monitor: Monitor, words: bytes, errors: list[str], listening: Callable[..., socket.socket]
) -> None:
    caller = listening(monitor, words)
    assert health(monitor)[0] == 200
    caller.close()
    assert health(monitor)[0] == 200


def test_too_many_callers_are_hung_up_on(monitor: Monitor, listening: Callable[..., socket.socket]) -> None:
    callers = [listening(monitor, b"GET /he") for _ in range(CALLERS + 1)]
    callers[-1].settimeout(WAIT)
    try:
        heard = callers[-1].recv(100)
    except ConnectionError:
        heard = b""
    for caller in callers[:-1]:
        caller.sendall(b"althz HTTP/1.0\r\n\r\n")

    assert heard == b""
    assert [caller.recv(12) for caller in callers[:-1]] == [b"HTTP/1.0 200"] * CALLERS


@pytest.fixture
def listening() -> Iterator[Callable[..., socket.socket]]:
    """``listening(monitor, words)``: somebody who has said that much."""
    open_ = list[socket.socket]()

    def make(monitor: Monitor, words: bytes) -> socket.socket:
        open_.append(socket.create_connection((monitor.address.host, monitor.address.port), WAIT))
        open_[-1].sendall(words)
        return open_[-1]

    yield make
    for caller in open_:
        caller.close()
