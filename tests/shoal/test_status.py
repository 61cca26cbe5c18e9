"""``shoal status`` beside a real server, and beside what is none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from rich.console import Console

from shoal.notice import Ticker, duration, notice, size
from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.transport import Address, Certificates
from shoal.serve import Door
from shoal.server.monitor import Monitor
from shoal.server.orders import Disk
from shoal.server.serving import Serving
from shoal.status import Unreachable, look, looking, plain, watch
from tests.server.test_tls import authority
from tests.shoal.test_serve import GATE, crowd, place, serve, shards, write

if TYPE_CHECKING:
    from tests.shoal.conftest import Start

__all__ = ["place", "shards"]  # fixtures

LOOPBACK = Address("127.0.0.1", 0)


@pytest.fixture
def serving() -> Iterator[Serving]:
    with closing(Serving(LOOPBACK, None)) as serving:
        yield serving


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)  # six processes, on a machine that does other things too
def test_a_server_is_looked_at_while_a_round_goes_on(start: Start, shards: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server = serve(start, write(shards.parent, more=GATE, clients_every=0), more=("--http", port))
    hosted = crowd(start, server, shards, 3, "--allow", "gated.py:Gated", "--workers", "2")
    hosted.wait_for("at the gate")
    status = ("status", server.address, "--insecure")
    watching = start(*status, "--watch")
    watching.wait_for("round 2 of 3, training; 3 asked: 1 training, 2 answered; 3 connected")
    told = start(*status, "--json")
    assert told.wait() == 0, told.text
    metrics = read(port, "metrics")
    server.signal(signal.SIGTERM)
    watching.wait_for("about to stop")
    health = read(port, "healthz")
    (shards.parent / "gate").open("w").close()
    assert server.wait() == 130, server.text
    watching.wait_for("nothing answers at")
    watching.signal(signal.SIGINT)
    assert watching.wait() == 130
    hosted.end()

    reply = json.loads(told.text)
    assert reply.keys() == {field.name for field in wire.StatusReply.DESCRIPTOR.fields}
    assert {t["client"]: t["state"] for t in reply["tasks"]} == {"a": "answered", "b": "training", "c": "answered"}
    assert reply["run"]["states"] == {"answered": 2, "training": 1}
    assert (reply["run"]["round"], reply["run"]["folder"], reply["connected"]) == (2, "runs/0001-tiny", 3)
    assert 'shoal_answers_total{outcome="accepted",task="train"} 5.0' in metrics.splitlines()
    assert json.loads(health) == {"ok": True, "reason": "", "draining": True}


def read(port: str, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
        return str(answer.read(), "utf-8")


@pytest.mark.slow
def test_it_needs_no_torch() -> None:
    code = "import sys, shoal.status; print({'torch', 'numpy', 'pandas'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


# --- by function ------------------------------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_is_exit_code_1(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(serving.address, None, as_json=False) == 0
    serving.tell(Disk("No space left on device"))
    assert look(serving.address, None, as_json=False) == 1
    assert "takes no more since 0 s (No space left on device)" in capsys.readouterr().out
    assert look(serving.address, None, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["disk"] == "No space left on device"


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = Address("127.0.0.1", door.getsockname()[1])
    with (
        looking(address, None) as ask,
        pytest.raises(Unreachable, match=r"nothing answers at .*; start the server"),
    ):
        ask()


def test_a_website_is_no_server(serving: Serving) -> None:
    refused = pytest.raises(ConnectionRefused, match=r"speaks no plain gRPC; give --tls DIR if it uses TLS, or correct")
    with closing(Monitor(LOOPBACK, serving)) as website, looking(website.address, None) as ask, refused:
        ask()


def test_the_address_of_the_metrics_is_this_machines_unless_another_is_given(serving: Serving) -> None:
    shown = [Door("127.0.0.1:0", http=http).show_at() for http in (None, "9470", "0.0.0.0:9470")]
    assert shown == [None, Address("127.0.0.1", 9470), Address("0.0.0.0", 9470)]
    with pytest.raises(ConnectionRefused, match="is not of the form HOST:PORT"):
        Door("127.0.0.1:0", http="here").show_at()


def test_a_second_server_does_not_share_the_address_of_the_metrics(serving: Serving) -> None:
    with closing(Monitor(LOOPBACK, serving)) as first:
        door = Door("127.0.0.1:0", insecure=True, http=str(first.address))
        with pytest.raises(ConnectionRefused, match=r"cannot show metrics at .*Address already in use"), door.open():
            pass


def test_another_grpc_server_is_no_shoal_server() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    address = Address("127.0.0.1", other.add_insecure_port("127.0.0.1:0"))
    other.start()
    try:
        with (
            looking(address, None) as ask,
            pytest.raises(ConnectionRefused, match="shows no status; correct") as caught,
        ):
            ask()
    finally:
        other.stop(None).wait()
    assert not isinstance(caught.value, Unreachable)


def test_with_tls_it_needs_a_certificate_of_the_servers_ca(tmp_path: Path) -> None:
    ours, theirs = authority(tmp_path / "ours"), authority(tmp_path / "theirs")
    with closing(Serving(Address("localhost", 0), ours("server"))) as serving:

        def ask(certificates: Certificates | None) -> wire.StatusReply:
            with looking(serving.address, certificates) as ask:
                return ask()

        assert ask(ours("operator")).connected == 0
        with pytest.raises(ConnectionRefused, match="give --tls DIR if it uses TLS"):
            ask(None)
        with pytest.raises(ConnectionRefused, match="the server's certificate is not accepted"):
            ask(theirs("operator"))


def test_whoever_stops_reading_ends_the_watch(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*words: object, **how: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: 1)
    watch(serving.address, None, as_json=True)


# --- words ------------------------------------------------------------------------------------------------------------


def a_reply(**changes: Any) -> wire.StatusReply:
    reply = wire.StatusReply(software="shoal 1", uptime=125, bytes_up=12_300_000, connected=2, asked=3)
    reply.run.MergeFrom(wire.RunStatus(folder="runs/0001-x", rounds=3, round=2, phase="training", phase_for=12))
    reply.run.states.update({"answered": 1, "training": 2})
    reply.run.metrics["test_accuracy"] = 0.81234
    reply.tasks.add(client="a", state="answered", connected=True)
    reply.tasks.add(client="[b]", state="training", silent_for=61, lease_left=29, overdue=True, asked_for=70)
    reply.tasks.add(client="c", state="rejected", reason="why")
    reply.connections.add(client="a", peer="127.0.0.1:1", connected_for=3700)
    reply.connections.add(client="d", peer="[::1]:2", connected_for=5)
    reply.troubles.add(client="c", round=2, state="rejected", reason="client 'c' sent nan", ago=3)
    reply.MergeFrom(wire.StatusReply(**changes))
    return reply


def said(reply: wire.StatusReply, width: int = 200) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(notice(reply, "host:1"))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_notice() -> None:
    assert said(a_reply()) == [
        "server   shoal 1 at host:1, up for 2 min 5 s",
        "run      runs/0001-x",
        "round    2 of 3, training for 12 s",
        "asked    3: 2 training, 1 answered",
        "metrics  test_accuracy 0.8123",
        "clients  2 connected",
        "bytes    12.3 MB up, 0 B down",
        "disk     takes what is written",
        "",
        "client  state              for         last sign  lease left  answer  connected  from",
        "a       answered                                                      1 h 1 min  127.0.0.1:1",
        "[b]     training, overdue  1 min 10 s  1 min 1 s  29 s                no",
        "c       rejected                                                      no",
        "d       not asked                      0 s                            5 s        [::1]:2",
        "",
        "last failures",
        "  3 s ago, round 2: rejected: client 'c' sent nan",
    ]


def test_of_a_crowd_those_are_named_that_need_attention() -> None:
    reply = a_reply(tasks=[wire.TaskStatus(client=f"n{number}", state="answered") for number in range(50)])
    rows = said(reply)
    table = rows[rows.index("") + 2 :]

    assert [row.split()[0] for row in table[:3]] == ["[b]", "c", "a"]
    assert "and 34 more; --json has them" in table


def test_a_line_is_said_once() -> None:
    ticker = Ticker()
    first = ticker.lines(a_reply())
    later = ticker.lines(a_reply(uptime=200))
    gone = ticker.lost("nothing answers"), ticker.lost("nothing answers")
    again = ticker.lines(
        a_reply(draining=True, troubles=[wire.Trouble(client="e", round=2, state="lost", reason="it")])
    )

    assert first == [
        "round 2: rejected: client 'c' sent nan",
        "round 2 of 3, training; 3 asked: 2 training, 1 answered; 2 connected",
    ]
    assert (later, gone) == ([], (["nothing answers"], []))
    assert again[0] == "round 2: lost: client 'e': it"
    assert again[1].endswith("2 connected; about to stop")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (100_000, "1 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2.5e9, "2.5 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_a_reply_as_json_has_every_field() -> None:
    told = plain(a_reply())

    assert json.loads(json.dumps(told)) == told
    assert told["run"]["deadline_in"] is None
    assert (told["run"]["metrics"], told["bytes_up"]) == ({"test_accuracy": 0.81234}, 12_300_000)
    assert plain(wire.StatusReply())["run"] is None
