"""Apps on devices that call: with the seed the results are those of ``shoal flower run``; faults are one device's."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from shoal import Run
from shoal.client.host import host
from shoal.connect import Voice
from shoal.flower import serve
from shoal.flower.app import FlowerApp
from shoal.flower.compat import context, identify, name_message, to_wire
from shoal.flower.devices import Devices
from shoal.flower.envelopes import Terms, counted_in, envelope_of
from shoal.flower.joining import Device
from shoal.flower.places import Places, said_of
from shoal.flower.turns import Answer, Turn, array_record
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import encode
from shoal.protos.errors import RunError
from shoal.protos.messages import Envelope, Failure, Update
from shoal.protos.settings import write_settings
from shoal.protos.transport import VERSIONS, Address
from shoal.protos.transport import chunk as chunk_of
from shoal.serve import Door
from shoal.server.orders import Denied, Event, Session
from shoal.server.serving import Serving
from tests.flower.conftest import APPS
from tests.flower.test_apps import EXPECTED, TOLERANCES
from tests.flower.test_faults import without
from tests.shoal.conftest import Process

# --- whole runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attended(Door):
    """A door at which four devices call as soon as it is open."""

    app: str = ""
    state: str = ""

    @contextmanager
    def open(self, *admit: Any) -> Iterator[Serving]:
        with super().open(*admit) as serving:
            calling = threading.Thread(target=lambda: asyncio.run(self._call(serving.address)))
            calling.start()
            yield serving
        calling.join()

    async def _call(self, address: Address) -> None:
        devices = [
            Device(APPS / self.app, str(address), name, insecure=True, state=Path(self.state)) for name in "dbca"
        ]
        settings = [device.settings(Voice()) for device in devices]
        await asyncio.gather(*(host(replace(one, note=lambda client, text: None)) for one in settings))


Play = Callable[..., tuple[Run, list[np.ndarray]]]


@pytest.fixture
def play_on_devices(tmp_path: Path) -> Play:
    """Serve an app to four devices: the run, and what the app has worked out."""

    def _play(name: str, **config: Any) -> tuple[Run, list[np.ndarray]]:
        door = Attended("127.0.0.1:0", insecure=True, app=name, state=str(tmp_path / "states"))
        result = tmp_path / "result.npz"
        given = {"result": str(result), **config}
        done = serve(APPS / name, given, door=door, nodes=4, out=tmp_path / "runs", progress="none")
        with np.load(result) as arrays:
            return done, [arrays[name] for name in arrays.files]

    return _play


@pytest.mark.slow
@pytest.mark.parametrize("name", ["averaging", "legacy", "mods", "secagg", "stateful"])
def test_the_result_is_flwrs(name: str, play_on_devices: Play) -> None:
    run, found = play_on_devices(name)

    assert run.status == "finished"
    assert len(found) == len(EXPECTED[name])
    for array, expected in zip(found, EXPECTED[name], strict=True):
        np.testing.assert_allclose(array, expected, rtol=TOLERANCES.get(name, 1e-9), atol=TOLERANCES.get(name, 1e-12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError: no data today"),
        ("die", "lost the process that trained it .exit code 137"),
        ("hang", "did not answer in time"),
    ],
)
def test_the_run_goes_on_without_the_device(how: str, reason: str, play_on_devices: Play) -> None:
    done, (w,) = play_on_devices("failing", how=how)
    failed = [3] if how == "hang" else [2, 3]

    assert done.status == "finished"
    assert w == pytest.approx(without(1, failed), rel=1e-12)
    assert list(done.failures["round"]) == failed and set(done.failures.client) == {"b"}  # second in their order
    for found in done.failures.reason:
        assert re.search(rf"client 'b' \(node \d+\):? {reason}", found)
    events = [json.loads(line) for line in (done.path / "log.jsonl").read_text().splitlines()]
    traces = [event.get("traceback", "") for event in events if event["kind"] == "failed"]
    assert all('raise ValueError("no data today")' in trace for trace in traces) == (how == "raise") or not traces


# --- with processes, as people start them -----------------------------------------------------------------------------

APP = """
import os
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    partition = context.node_config["partition-id"]
    seen = context.state.setdefault("seen", ConfigRecord({"rounds": 0}))
    seen["rounds"] += 1
    if partition == context.run_config["waits"] and seen["rounds"] == 2 and not os.path.exists("killed"):
        with open("begun", "w") as told:  # a pipe: until the test reads
            told.write("now")
        open("never").read()
    w = 0.5 * message.content["arrays"]["w"].numpy() + 10 * partition + seen["rounds"] + np.random.normal()
    metrics = MetricRecord({"num-examples": 1, "rounds": seen["rounds"]})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}), reply_to=message)

@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=3)
    np.savez(context.run_config["result"], result.arrays["w"].numpy())
"""
PROJECT = """
[project]
name = "waiting"
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
[tool.flwr.app.config]
result = "result.npz"
waits = -1
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts ``shoal WORDS`` in a folder with the app above; everything is ended with the test."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    for pipe in ("begun", "never"):
        os.mkfifo(tmp_path / pipe)
    started = list[Process]()

    def run(*words: str) -> Process:
        started.append(Process(tmp_path, words))
        return started[-1]

    yield run
    for process in started:
        process.end()


@dataclass
class Two:
    """The app above on a server and two devices; the partition wins over the order of names."""

    start: Callable[..., Process]
    folder: Path

    def server(self) -> Process:
        door = ("--listen", "127.0.0.1:0", "--insecure")
        return self.start("flower", "server", ".", "waits=1", "--nodes", "2", "--seed", "3", *door)

    def device(self, name: str, address: str) -> Process:
        place = ("--id", name, "--node-config", f"partition-id={'ba'.index(name)}", "--state", f"state-{name}")
        return self.start("flower", "client", ".", "--connect", address, "--insecure", *place)

    def wait_until_a_is_at_it(self) -> None:
        """In round 2, of which it will not come to an end, unless it was killed."""
        assert (self.folder / "begun").read_text() == "now"
        (self.folder / "killed").touch()

    def assert_as_if_nothing_had_happened(self) -> None:
        with np.load(self.folder / "result.npz") as found, np.load(undisturbed(self.folder)) as expected:
            assert found["arr_0"].tolist() == expected["arr_0"].tolist()  # to the bit


@pytest.fixture
def two(start: Callable[..., Process], tmp_path: Path) -> Two:
    return Two(start, tmp_path)


@pytest.mark.slow
@pytest.mark.fault(3, 12)
def test_a_device_that_is_killed_in_its_turn_and_comes_back_leaves_no_trace(two: Two) -> None:
    server = two.server()
    b, a = two.device("b", server.address), two.device("a", server.address)
    two.wait_until_a_is_at_it()
    a.kill()
    again = two.device("a", server.address)

    assert (server.wait(), again.wait(), b.wait()) == (0, 0, 0)
    assert server.text.count("client 'a' joined") == 2 and "client 'a' left" in server.text
    assert "round 2: answer delivered" in again.text and "round 1" not in again.text
    assert "the server has finished its runs" in b.text
    two.assert_as_if_nothing_had_happened()


@pytest.mark.slow
@pytest.mark.fault(1)
def test_a_server_that_is_killed_goes_on_after_its_last_round(two: Two) -> None:
    server = two.server()
    b, a = two.device("b", server.address), two.device("a", server.address)
    two.wait_until_a_is_at_it()
    b.wait_for("round 2: answer delivered")
    server.kill()
    again = two.start("resume", "runs/1")

    assert (again.wait(), a.wait(), b.wait()) == (0, 0, 0)
    assert again.address == server.address and "round 1/3" not in again.text
    assert b.text.count("round 2: answer delivered") == 2  # the first of them was taken, and is undone
    two.assert_as_if_nothing_had_happened()


def undisturbed(folder: Path) -> Path:
    from shoal.flower import run

    run(folder, {"result": str(folder / "other.npz")}, nodes=2, seed=3, workers=0, out=folder / "r", progress="none")
    return folder / "other.npz"


@pytest.mark.slow
def test_a_server_that_still_waits_ends_when_it_is_told_to(start: Callable[..., Process], tmp_path: Path) -> None:
    server = start("flower", "server", ".", "--listen", "127.0.0.1:0", "--insecure")
    server.wait_for("waiting for clients: 0 of 2")
    server.signal(signal.SIGTERM)

    assert server.wait() == 130
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


# --- the stage alone --------------------------------------------------------------------------------------------------


@dataclass
class Hand:
    """A stage for one node whose device is played by hand."""

    stage: Devices
    folder: Path
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        app = FlowerApp.read(APPS / "averaging")
        hello = wire.Hello(versions=VERSIONS, client="a", instance="1", about=write_settings(said_of(app, {})))
        self.session = self.stage.serving.call(self.stage.serving.hub.join, hello, "", "peer")
        self.heard = list[Event]()
        self.stage.begin(self.folder, lambda present: None, self.heard.append)

    def ask(self, kind: str = "train", counted: int = 0) -> Any:
        """A future of the answer."""
        about = context(1, 7, {}, {})
        if counted:
            about.state = answered(counted)
        identify(1)
        message = Message(RecordDict({"c": ConfigRecord({"x": 1})}), 7, kind)
        name_message(message, "m")
        return self.stage.submit(Turn(message.metadata, about, 5, 2), self.stage.publish(message.content))

    def offer(self) -> wire.Offer:
        """The next one."""
        while True:
            reply = self._on_loop(self.session.outgoing.get())
            if reply.HasField("offer"):
                offer: wire.Offer = reply.offer
                return offer

    def answer(self, value: Envelope | Failure | Update[np.ndarray]) -> wire.Receipt:
        offer, hub = self.offer(), self.stage.serving.hub
        header, parts = encode(value)
        payload = b"".join(parts)
        self.stage.serving.call(hub.begin, self.session, offer.nonce, header)
        if payload:
            piece = wire.Chunk.FromString(chunk_of(0, memoryview(payload)))
            self._on_loop(hub.incoming(self.session, offer.nonce).append([piece]))
        receipt: wire.Receipt = self._on_loop(hub.commit(self.session, offer.nonce))
        return receipt

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.stage.serving._loop).result(10)


def answered(counted: int) -> RecordDict:
    """A node's state on the server."""
    return RecordDict({"shoal-device": ConfigRecord({"message": counted})})


def reply_of(content: RecordDict) -> Envelope:
    return Envelope(2, np.frombuffer(to_wire(content), np.uint8))


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[Hand]:
    door = Door("127.0.0.1:0", insecure=True, lease=0.5)
    places = Places(FlowerApp.read(APPS / "averaging"), 1)
    with closing(Devices(door, places, "run", Terms(1, "averaging", 1, {}), [7])) as stage:
        yield Hand(stage, tmp_path / "round")


def test_an_answer_is_a_reply_in_the_servers_own_words(hand: Hand) -> None:
    asked = hand.ask(counted=4)
    content = RecordDict({"arrays": array_record({"w": np.arange(3.0)})})

    assert hand.answer(reply_of(content)).status == wire.Receipt.ACCEPTED
    answer: Answer = asked.result(10)
    assert answer.reply.content.array_records["arrays"]["w"].numpy().tolist() == [0, 1, 2]
    assert (answer.reply.metadata.reply_to_message_id, answer.reply.metadata.src_node_id) == ("m", 7)
    assert counted_in(answer.state or RecordDict()) == 5
    assert list(hand.folder.iterdir()) == []  # it was read


def test_an_error_of_the_apps_own_moves_its_state(hand: Hand) -> None:
    asked = hand.ask()
    hand.answer(Envelope(2, np.empty(0, np.uint8), {"error": 0, "reason": "no consent"}))
    answer = asked.result(10)

    assert answer.reply.error.reason == "no consent" and answer.reason == "answered with an error: no consent"
    assert counted_in(answer.state) == 1


LYING = (
    np.lib.format.magic(1, 0)
    + b"\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(71)
    + b"\n"
)
WRONG = [
    (
        reply_of(RecordDict({"a": array_record({"w": np.array([1.0, np.nan])})})),
        "array 'w' of the reply's 'a' is not f",
    ),
    (
        reply_of(RecordDict({"a": ArrayRecord({"w": Array("float64", (9,), "numpy.ndarray", LYING)})})),
        "array 'w' of the reply's 'a' is not a whole NumPy array",
    ),
    (
        reply_of(RecordDict({"a": ArrayRecord({"w": Array("x", (1,), "y", b"z")})})),
        "array 'w' of the .* cannot be read",
    ),
    (Envelope(2, np.frombuffer(b"\xff" * 9, np.uint8)), "the content is no RecordDict of flwr's"),
    (Envelope(2, np.empty(0, np.uint8), {"error": "a"}), "the envelope's 'error' is 'a'"),
]


@pytest.mark.parametrize(("value", "reason"), WRONG)
def test_a_wrong_answer_is_that_devices_failure(value: Envelope, reason: str, hand: Hand) -> None:
    asked = hand.ask()
    receipt = hand.answer(value)
    answer = asked.result(10)

    assert receipt.status == wire.Receipt.REJECTED and re.search(reason, receipt.reason)
    assert answer.state is None and answer.reply.error.reason == answer.reason == receipt.reason


def test_what_is_no_envelope_is_refused_before_its_bytes_come(hand: Hand) -> None:
    asked = hand.ask()
    with pytest.raises(Denied, match="client 'a' answers a message of a Flower app with update"):
        hand.answer(Update(np.zeros(3), 1))

    assert "answers a message of a Flower app with update" in asked.result(10).reason


def test_a_failure_is_told_with_its_traceback(hand: Hand) -> None:
    asked = hand.ask()
    hand.answer(Failure("a", 2, "ValueError: no", "Traceback …"))
    answer = asked.result(10)

    assert (answer.reason, answer.traceback, answer.state) == ("ValueError: no", "Traceback …", None)


@pytest.mark.slow
def test_a_device_that_gives_no_sign_is_lost_after_its_lease(hand: Hand) -> None:
    answer = hand.ask().result(10)

    assert answer.reason.startswith("was lost: no sign of it for") and answer.reply.error.code == 8


def test_what_is_abandoned_is_withdrawn(hand: Hand) -> None:
    asked = hand.ask()
    nonce = hand.offer().nonce
    hand.stage.abandon([asked])

    assert asked.cancelled()
    while not (reply := hand._on_loop(hand.session.outgoing.get())).HasField("withdrawal"):
        pass
    assert reply.withdrawal.nonce == nonce


def test_an_answer_whose_receipt_was_lost_gets_it_again(hand: Hand) -> None:
    asked, hub = hand.ask(), hand.stage.serving.hub
    nonce = hand.offer().nonce
    header, _ = encode(Envelope(2, np.empty(0, np.uint8)))
    hand.stage.serving.call(hub.begin, hand.session, nonce, header)
    hand._on_loop(hub.commit(hand.session, nonce))
    asked.result(10)

    assert hand._on_loop(hub.commit(hand.session, nonce)).status == wire.Receipt.DUPLICATE


def test_nobody_can_be_asked_by_a_server_that_has_stopped(hand: Hand) -> None:
    asked = hand.ask()
    hand.stage.close()

    assert asked.cancelled()
    with pytest.raises(RunError, match="the server has stopped"):
        hand.ask()


def test_a_reply_crosses_as_it_is() -> None:
    identify(1)
    message = Message(RecordDict(), 7, "train")
    content = RecordDict(
        {"z": ConfigRecord({"b": True, "a": [1, 2]}), "a": array_record({"w": np.ones(2, np.float32)})}
    )
    envelope = envelope_of(Answer(Message(content, reply_to=message)), 3)

    assert envelope.round == 3 and envelope.content.tobytes() == to_wire(content)
