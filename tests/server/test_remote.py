"""Rounds with clients that call: the sum of a simulation, whatever the clients do and in whatever order."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import Value, content_of, decode_task, encode
from shoal.protos.messages import Failure, Kind, Measurement, Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.server.coordinator import Coordinator, Plan, start
from shoal.server.fleet import Ask, Part, Report
from shoal.server.journal import Journal
from shoal.server.orders import Event, Joined, Left
from shoal.server.remote import Member, RemoteFleet, Terms
from shoal.server.serving import Serving
from shoal.strategies.base import Context, Mine, Sent, State, Strategy, Trainer
from shoal.strategies.base import Terms as Summed
from shoal.strategies.base import Update as Trained
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.fednova import FedNova
from shoal.strategies.selectors import Uniform
from shoal.strategies.sums import Carried, Contribution, LeafSum, contribute
from tests.server.asking import journal_of

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

WAIT = 10.0
SIZE = 5
LAYOUT = Layout(
    (
        Entry("w", Segment.TRAINABLE, "float32", (SIZE,)),
        Entry("mean", Segment.BUFFERS, "float32", (2,)),
        Entry("steps", Segment.COUNTERS, "int64", ()),
    )
)
INITIAL = Parameters(LAYOUT, torch.zeros(SIZE), torch.zeros(2), torch.zeros(1, dtype=torch.int64))
STRATEGY = FedAvg()
NAMES = [f"client {number}" for number in range(20)]
Array = np.ndarray
Spool = Callable[[], list[str]]


def an_update(number: int = 0, **changes: Any) -> Update[Array]:
    """Of bits that show in which order they were added."""
    rng, number = np.random.default_rng(number), int(number)
    fields: dict[str, Any] = {
        "delta": rng.normal(size=SIZE).astype("float32"),
        "examples": number + 1,
        "steps": 2,
        "lr_sum": 0.2,
        "buffers": rng.normal(size=2).astype("float32"),
        "counters": np.array([number]),
        "metrics": {"loss": 0.5},
    }
    return Update(**(fields | changes))


def an_ask(cohort: Sequence[str], round: int = 1, **changes: Any) -> Ask:
    fields: dict[str, Any] = {
        "cohort": cohort,
        "goal": len(cohort),
        "state": STRATEGY.init(INITIAL.trainable),
        "carried": Carried(INITIAL.buffers, INITIAL.counters),
        "context": Context(round, len(cohort), len(cohort)),
    }
    return Ask(**(fields | changes))


def summed(ask: Ask, updates: Mapping[int, Update[Array]]) -> Contribution | None:
    """What the round must give, by the cohort's positions."""
    total = LeafSum()
    for position in range(len(ask.cohort)):
        update = updates.get(position)
        one = None if update is None else update.map(lambda array: torch.from_numpy(array.copy()))
        total.add(position, None if one is None else contribute(STRATEGY, ask.state, one, ask.context))
    return total.total()


def total(parts: Sequence[Part]) -> Contribution | None:
    sum_ = LeafSum()
    for part in parts:
        sum_.add(part.position, part.total)
    return sum_.total()


def bits(found: Contribution | None) -> Any:
    assert found is not None
    tensors = [found.terms[name] for name in sorted(found.terms)] + [found.buffers, found.counters]
    values = [value.numpy().tobytes() if isinstance(value, Tensor) else value for value in tensors]
    return values, found.examples, found.counted


class House:
    """A fleet behind a real server, whose rounds run in a thread."""

    def __init__(
        self,
        serving: Serving,
        pool: ThreadPoolExecutor,
        journal: Journal | None = None,
        strategy: Strategy = STRATEGY,
    ) -> None:
        self.serving, self._pool, self.heard = serving, pool, list[Event]()
        terms = Terms("run", b"{}", strategy, INITIAL, lease=30.0)
        self.fleet = RemoteFleet(serving, terms, journal or journal_of(serving), (), self.heard.append)

    def train(self, ask: Ask) -> Future[list[Part]]:
        return self._pool.submit(lambda: list(self.fleet.train(ask)))

    def evaluate(self, ask: Ask) -> Future[list[Report | Failure]]:
        return self._pool.submit(lambda: list(self.fleet.evaluate(ask)))


@pytest.fixture
def house(serve: Serve) -> Iterator[House]:
    with ThreadPoolExecutor(1) as pool:
        yield House(serve(), pool)


def failures(parts: Sequence[Part]) -> list[Failure]:
    return [failure for part in parts for failure in part.failures]


# --- whole rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sum_is_that_of_the_cohorts_order_whoever_comes_first(
    house: House, join: Join, spool: Spool, seed: int
) -> None:
    peers = [join(house.serving, name) for name in NAMES]
    ask = an_ask(NAMES)
    round = house.train(ask)
    offers = [peer.hear("offer") for peer in peers]
    for number in np.random.default_rng(seed).permutation(len(peers)):
        assert peers[number].answer(offers[number].nonce, an_update(number)).status == wire.Receipt.ACCEPTED
    parts = round.result(WAIT)

    assert bits(total(parts)) == bits(summed(ask, {number: an_update(number) for number in range(len(NAMES))}))
    assert [part.position for part in parts] == list(range(len(NAMES)))
    assert (failures(parts), spool()) == ([], [])


def test_a_report_says_what_the_client_did_and_what_crossed(house: House, join: Join) -> None:
    peer = join(house.serving)
    round = house.train(an_ask(["a"]))
    peer.answer(peer.hear("offer").nonce, an_update(3))
    ((report,),) = [part.reports for part in round.result(WAIT)]

    expected = {"loss": 0.5, "examples": 4.0, "steps": 2.0, "lr_sum": 0.2, "bytes_down": 36.0, "bytes_up": 36.0}
    assert (report.client, report.numbers) == ("a", expected)


def test_a_client_reads_the_model_that_was_sent(house: House, join: Join) -> None:
    peer = join(house.serving)
    state = STRATEGY.init(torch.arange(SIZE, dtype=torch.float32))
    house.train(an_ask(["a"], round=7, state=state))
    offer = peer.hear("offer")
    task, _ = decode_task(offer.header, peer.download(content_of(offer.header)[1]))
    peer.answer(offer.nonce, an_update())

    assert (task.kind, task.round, task.version) == (Kind.TRAIN, 7, 6)
    assert task.model.trainable.tolist() == [0, 1, 2, 3, 4]
    assert task.model.layout == LAYOUT


@pytest.mark.slow
def test_a_coordinator_runs_over_it(house: House, join: Join, spool: Spool) -> None:
    peers = [join(house.serving, name) for name in NAMES[:3]]
    plan = Plan(rounds=3, cohort=3, evaluate_clients_every=1)
    coordinator = Coordinator(plan, STRATEGY, Uniform(), house.fleet, start(STRATEGY, Uniform(), INITIAL))

    def play(peer: Peer) -> list[int]:
        counted = []
        for _ in range(2 * plan.rounds):
            offer = peer.hear("offer")
            kind = wire.Header.FromString(offer.header).task.kind
            peer.answer(offer.nonce, an_update() if kind == "train" else Measurement({"loss": 1.0, "examples": 3}))
            counted.append(offer.counted)
        return counted

    with ThreadPoolExecutor(3) as players:
        playing = [players.submit(play, peer) for peer in peers]
        point = coordinator.run()

    assert [player.result(WAIT) for player in playing] == [[0, 1, 1, 2, 2, 3]] * 3
    assert (point.round, spool()) == (3, [])
    assert point.clients == dict.fromkeys(NAMES[:3], 3)


def test_a_fleet_that_is_restored_knows_whose_state_is_of_which_round(house: House, join: Join) -> None:
    house.fleet.restore({"a": 5})
    peer = join(house.serving)
    round = house.train(an_ask(["a"], round=6))
    offer = peer.hear("offer")
    peer.answer(offer.nonce, an_update())
    round.result(WAIT)

    assert offer.counted == 5
    assert house.fleet.snapshot() == {"a": 5}


# --- answers that must not be counted ---------------------------------------------------------------------------------


def _header_with(number: wire.Number) -> tuple[bytes, bytes]:
    """An update whose header was written by hand: encode would refuse it."""
    header, buffers = encode(an_update())
    message = wire.Header.FromString(header)
    message.update.examples.CopyFrom(number)
    return message.SerializeToString(), b"".join(buffers)


def _packed(value: Value) -> tuple[bytes, bytes]:
    header, buffers = encode(value)
    return header, b"".join(buffers)


HUGE = np.full(SIZE, np.inf, "float32")
BAD = {
    "NaN": (_packed(an_update(delta=np.full(SIZE, np.nan, "float32"))), "holds nan in its delta in tensor 'w'"),
    "infinite": (_packed(an_update(delta=HUGE)), "holds inf in its delta"),
    "infinite buffers": (_packed(an_update(buffers=HUGE[:2])), "holds inf in its buffers in tensor 'mean'"),
    "shape": (_packed(an_update(delta=np.zeros(SIZE + 1, "float32"))), r"expected float32\[5\]"),
    "broadcast": (_packed(an_update(delta=np.zeros((1,), "float32"))), r"delta of float32\[1\]"),
    "axes": (_packed(an_update(delta=np.zeros((1, SIZE), "float32"))), r"float32\[1, 5\]"),
    "dtype": (_packed(an_update(delta=np.zeros(SIZE))), r"delta of float64\[5\], expected float32"),
    "no buffers": (_packed(an_update(buffers=None)), "has no buffers"),
    "no counters": (_packed(an_update(counters=None)), "has no counters"),
    "extra": (_packed(an_update(tensors={"c": np.zeros(1)})), r"brings tensors \['c'\], but \[\] are declared"),
    "negative": (_header_with(wire.Number(integer=-1)), "examples=-1"),
    "NaN examples": (_header_with(wire.Number(real=np.nan)), "examples is nan"),
    "no examples": (_header_with(wire.Number()), "examples is missing"),
    "1e15": (_header_with(wire.Number(real=1e15)), "examples=1000000000000000"),
    "a measurement": (_packed(Measurement({"loss": 1.0})), "answers the task to train with measurement"),
}


def _row(name: str) -> int:
    """Of the list of faults: not finite, absurd numbers of examples, or of another form."""
    if name in ("NaN", "infinite", "infinite buffers"):
        return 8
    return 11 if name in ("negative", "NaN examples", "no examples", "1e15") else 9


@pytest.mark.parametrize(
    ("answer", "reason"),
    [pytest.param(*case, id=name, marks=pytest.mark.fault(_row(name))) for name, case in BAD.items()],
)
def test_a_bad_answer_is_its_clients_failure_and_nobody_elses(
    house: House, join: Join, spool: Spool, answer: tuple[bytes, bytes], reason: str
) -> None:
    good, bad = join(house.serving, "good"), join(house.serving, "bad")
    ask = an_ask(["bad", "good"])
    round = house.train(ask)
    nonce = bad.hear("offer").nonce
    try:
        bad.begin(nonce, answer[0])
        bad.upload(nonce, answer[1])
        assert bad.commit(nonce).status == wire.Receipt.REJECTED
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    good.answer(good.hear("offer").nonce, an_update(1))
    parts = round.result(WAIT)
    (failure,) = failures(parts)

    assert bits(total(parts)) == bits(summed(ask, {1: an_update(1)}))
    assert (failure.client, failure.round, spool()) == ("bad", 1, [])
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(failure.reason)


class Divides(Strategy):
    """It does not expect an update without examples."""

    citation = "none"

    def local(self, trainer: Trainer, sent: Sent, mine: Mine) -> tuple[Trained, Mine]:
        raise NotImplementedError

    def contribute(self, state: State, update: Trained, context: Context) -> Summed:
        return {"delta": update.delta, "share": 1 / update.examples}

    def finish(self, state: State, total: Summed, context: Context) -> State:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [(FedNova(), {"steps": 0}), (FedNova(momentum=0.5), {"steps": 0.5}), (Divides(), {"examples": 0})],
)
def test_numbers_with_which_a_strategy_cannot_compute_are_their_clients_failure_and_it_is_asked_again(
    serve: Serve, join: Join, tmp_path: Path, strategy: Strategy, changes: dict[str, Any]
) -> None:
    journal = Journal(tmp_path / "kept")
    with ThreadPoolExecutor(1) as pool:
        house = House(serve(), pool, journal, strategy)
        round = house.train(an_ask(["a", "b"]))
        for name, update in {"a": an_update(0, **changes), "b": an_update(1)}.items():
            peer = join(house.serving, name)
            assert peer.answer(peer.hear("offer").nonce, update).status == wire.Receipt.ACCEPTED
        (failure,) = failures(round.result(WAIT))
        asked = journal.recall(1, Kind.TRAIN)
        house.fleet.close()

    assert (failure.client, failure.kind, "cannot be counted" in failure.reason) == ("a", "rejected", True)
    assert asked is not None
    assert list(asked.taken) == [asked.nonces[1]]


@pytest.mark.fault(9, 10)
def test_what_is_wrong_by_its_shape_is_refused_before_a_byte_is_sent(house: House, join: Join, spool: Spool) -> None:
    peer = join(house.serving)
    round = house.train(an_ask(["a"]))
    header, _ = encode(an_update(delta=np.zeros(2**22, "float32")))
    with pytest.raises(grpc.RpcError, match=r"float32\[4194304\], expected float32\[5\]"):
        peer.begin(peer.hear("offer").nonce, header)

    assert len(failures(round.result(WAIT))) == 1
    assert spool() == []


def test_an_update_is_no_answer_to_an_evaluation(house: House, join: Join) -> None:
    wrong, right, silent = (join(house.serving, name) for name in "abc")
    round = house.evaluate(an_ask(["a", "b", "c"]))
    with pytest.raises(grpc.RpcError, match="answers the task to evaluate with update"):
        wrong.answer(wrong.hear("offer").nonce, an_update())
    right.answer(right.hear("offer").nonce, Measurement({"loss": 2.0, "examples": 3}))
    silent.answer(silent.hear("offer").nonce, Measurement())
    failed, report = round.result(WAIT)

    assert isinstance(failed, Failure) and failed.client == "a"
    assert report == Report("b", {"loss": 2.0, "examples": 3})


@pytest.mark.fault(23)
def test_a_clients_own_failure_keeps_its_traceback(house: House, join: Join) -> None:
    peer = join(house.serving)
    round = house.train(an_ask(["a"]))
    peer.answer(peer.hear("offer").nonce, Failure("a", 1, "it broke", "Traceback …"))

    assert failures(round.result(WAIT)) == [Failure("a", 1, "it broke", "Traceback …")]


# --- who is not needed, or not there ----------------------------------------------------------------------------------


@pytest.mark.fault(12, 24)
def test_when_enough_have_answered_the_others_are_withdrawn(house: House, join: Join, spool: Spool) -> None:
    peers = [join(house.serving, name) for name in "abcd"]
    ask = an_ask(list("abcd"), goal=2)
    round = house.train(ask)
    nonces = [peer.hear("offer").nonce for peer in peers]
    half = an_update(1)
    peers[1].begin(nonces[1], encode(half)[0])
    for number in (3, 0):
        peers[number].answer(nonces[number], an_update(number))
    parts = round.result(WAIT)

    assert bits(total(parts)) == bits(summed(ask, {0: an_update(0), 3: an_update(3)}))
    assert spool() == []
    for number in (1, 2):
        assert peers[number].hear("withdrawal").nonce == nonces[number]
        with pytest.raises(grpc.RpcError, match="needs no answer any more"):
            peers[number].answer(nonces[number], an_update(number))
    assert spool() == []


def test_a_failure_does_not_count_towards_the_goal(house: House, join: Join) -> None:
    peers = [join(house.serving, name) for name in "abc"]
    ask = an_ask(list("abc"), goal=2)
    round = house.train(ask)
    nonces = [peer.hear("offer").nonce for peer in peers]
    peers[0].answer(nonces[0], Failure("a", 1, "no"))
    peers[2].answer(nonces[2], an_update(2))
    peers[1].answer(nonces[1], an_update(1))

    assert bits(total(round.result(WAIT))) == bits(summed(ask, {1: an_update(1), 2: an_update(2)}))


@pytest.mark.parametrize("arriving", ["abcd", "badc", "bcda", "dbca"])
def test_an_answer_that_cannot_be_counted_leaves_its_place_to_another(
    serve: Serve, join: Join, tmp_path: Path, arriving: str
) -> None:
    journal = Journal(tmp_path / "kept")
    with ThreadPoolExecutor(1) as pool:
        house = House(serve(), pool, journal, FedNova())
        peers = {name: join(house.serving, name) for name in "abcde"}  # e never answers
        round = house.train(an_ask("abcde", goal=3))
        offers = {name: peer.hear("offer").nonce for name, peer in peers.items()}
        for name in arriving:
            peers[name].answer(offers[name], an_update(0, steps=0) if name == "b" else an_update(1))
        parts = round.result(WAIT)
        house.fleet.close()

    assert [failure.client for failure in failures(parts)] == ["b"]
    assert sorted(report.client for part in parts for report in part.reports) == ["a", "c", "d"]


@pytest.mark.slow
def test_more_answers_than_needed_at_the_same_moment_leave_no_file(house: House, join: Join, spool: Spool) -> None:
    peers = [join(house.serving, name) for name in NAMES]
    for number in range(3):
        round = house.train(an_ask(NAMES, round=number + 1, goal=2))
        offers = [peer.hear("offer") for peer in peers]
        with ThreadPoolExecutor(len(peers)) as pool:
            for peer, offer in zip(peers, offers, strict=True):
                pool.submit(peer.answer, offer.nonce, an_update())
        found = total(round.result(WAIT))

        assert found is not None and found.counted == 2
    house.serving.call(lambda: None)
    assert spool() == []


@pytest.mark.fault(1)
def test_a_client_that_comes_back_in_the_middle_goes_on_where_it_was(house: House, join: Join) -> None:
    first = join(house.serving)
    ask = an_ask(["a"])
    round = house.train(ask)
    nonce, (header, payload) = first.hear("offer").nonce, _packed(an_update())
    first.begin(nonce, header)
    first.send([first.piece(nonce, 0, payload[:7])])
    first.leave()
    second = join(house.serving, instance="after a crash")

    assert second.hear("offer").nonce == nonce
    assert second.begin(nonce, header) == 7
    assert second.answer(nonce, an_update()).status == wire.Receipt.ACCEPTED
    assert bits(total(round.result(WAIT))) == bits(summed(ask, {0: an_update()}))


@pytest.mark.slow
@pytest.mark.fault(24)
def test_one_who_is_never_there_costs_a_deadline(house: House, join: Join) -> None:
    here = join(house.serving, "here")
    round = house.train(an_ask(["gone", "here"], deadline=0.3))
    here.answer(here.hear("offer").nonce, an_update())
    parts = round.result(WAIT)

    assert [failure.reason for failure in failures(parts)] == ["client 'gone' did not answer before the deadline"]
    assert [len(part.reports) for part in parts] == [0, 1]


def test_a_round_that_is_given_up_withdraws_its_tasks(house: House, join: Join, spool: Spool) -> None:
    peers = [join(house.serving, name) for name in "ab"]
    parts = house.fleet.train(an_ask(["a", "b"]))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, parts)
        peers[0].answer(peers[0].hear("offer").nonce, an_update())
        first.result(WAIT)
    parts.close()  # type: ignore[attr-defined]  # a generator

    assert peers[1].hear("withdrawal").reason == "the round is over without it"
    assert spool() == []


def test_a_round_that_is_given_up_at_its_end_leaves_no_file(house: House, join: Join, spool: Spool) -> None:
    peers = [join(house.serving, name) for name in "ab"]
    parts = house.fleet.train(an_ask(["a", "b"]))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, parts)
        for peer in reversed(peers):
            peer.answer(peer.hear("offer").nonce, an_update())
        first.result(WAIT)
    parts.close()  # type: ignore[attr-defined]  # a generator

    assert spool() == []


# --- the population ---------------------------------------------------------------------------------------------------


def test_clients_stand_in_the_order_of_the_data_and_then_by_name(serve: Serve, join: Join) -> None:
    serving = serve()
    fleet = RemoteFleet(serving, Terms("run", b"{}", STRATEGY, INITIAL), journal_of(serving), ["z", "absent", "b"])
    fleet.restore({"before": 1})
    peers = [join(serving, name) for name in ("c", "b", "a", "z")]

    assert fleet.reachable == ["z", "b", "a", "c"]
    peers[0].leave()
    while (event := serving.events.get(timeout=WAIT)) != Left("c", "it closed the connection"):
        assert isinstance(event, Joined)
    assert fleet.reachable == ["z", "b", "a"]
    assert fleet.population == ["z", "b", "a", "before", "c"]


def test_it_waits_until_enough_are_there(house: House, join: Join) -> None:
    said = queue.SimpleQueue[int]()
    waiting = threading.Thread(target=house.fleet.wait_for, args=(2, said.put, lambda: False))
    waiting.start()
    assert said.get(timeout=WAIT) == 0
    join(house.serving, "a")
    join(house.serving, "b")
    waiting.join(WAIT)

    assert not waiting.is_alive()
    assert {event.client for event in house.heard if isinstance(event, Joined)} <= {"a", "b"}


def test_waiting_ends_when_it_is_told_to_stop(house: House) -> None:
    house.fleet.wait_for(2, lambda present: None, lambda: True)


def test_reachable_clients_are_asked_first(house: House, join: Join) -> None:
    peers = {name: join(house.serving, name) for name in "abc"}
    peers["b"].leave()
    plan, point = Plan(rounds=1, cohort=2), start(STRATEGY, Uniform(), replace(INITIAL))
    coordinator = Coordinator(plan, STRATEGY, Uniform(), house.fleet, point)
    while house.serving.call(lambda: "b" in house.serving.hub.present):
        house.serving.events.get(timeout=WAIT)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(coordinator.run)
        for name in "ac":
            peers[name].answer(peers[name].hear("offer").nonce, an_update())
        assert running.result(WAIT).round == 1


# --- a server that is killed and comes back ---------------------------------------------------------------------------


@pytest.mark.fault(3, 6)
def test_a_round_goes_on_after_its_server_with_what_was_taken(serve: Serve, join: Join, tmp_path: Path) -> None:
    ask, folder = an_ask(list("abc")), tmp_path / "kept"
    with ThreadPoolExecutor(2) as pool:
        first = House(serve(), pool, Journal(folder))
        rounds = [first.train(ask)]
        peers = {name: join(first.serving, name) for name in "abc"}
        nonces = {name: peer.hear("offer").nonce for name, peer in peers.items()}
        peers["c"].answer(nonces["c"], an_update(2))
        header, buffers = encode(an_update(0))
        payload = b"".join(buffers)
        peers["a"].begin(nonces["a"], header)
        peers["a"].upload(nonces["a"], payload[:7])
        copied = Path(shutil.copytree(folder, tmp_path / "after"))  # what a kill leaves at this instant
        for name, number in (("a", 0), ("b", 1)):
            peers[name].answer(nonces[name], an_update(number))

        second = House(serve(), pool, Journal(copied))
        assert second.fleet.recall(1) == (list("abc"), 3)
        c = encode(an_update(2))[0]
        members = [Member(name, nonces[name], "", c if name == "c" else None) for name in "abc"]
        assert second.fleet.members(1) == members
        assert second.fleet.members(2) == []
        rounds.append(second.train(ask))
        peers = {name: join(second.serving, name) for name in "abc"}
        offers = {name: peers[name].hear("offer").nonce for name in "ab"}
        begun = [peers[name].begin(nonces[name], header) for name in "ac"]
        receipt = peers["c"].commit(nonces["c"])
        for name, number in (("a", 0), ("b", 1)):
            assert peers[name].answer(nonces[name], an_update(number)).status == wire.Receipt.ACCEPTED
        sums = [bits(total(round.result(WAIT))) for round in rounds]
        for house in (first, second):
            house.fleet.close()

    assert offers == {name: nonces[name] for name in "ab"}
    assert (begun, receipt.status) == ([7, len(payload)], wire.Receipt.DUPLICATE)
    assert sums == [bits(summed(ask, {number: an_update(number) for number in range(3)}))] * 2


@pytest.mark.fault(3)
def test_who_was_there_has_a_leases_time_to_come_back(
    serve: Serve, join: Join, event: Callable[[Serving, type[Left]], Left], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "kept")
    journal.open(1, Kind.TRAIN, ["a"], 3, ["a", "b"])
    with ThreadPoolExecutor(1) as pool:
        fleet = (house := House(serve(), pool, journal)).fleet
        join(house.serving, "c")
        assert (fleet.reachable, fleet.population) == (["a", "b", "c"], ["a", "b", "c"])
        join(house.serving, "a").leave()
        event(house.serving, Left)
        assert (fleet.reachable, fleet.population) == (["b", "c"], ["a", "b", "c"])
        fleet.close()


@pytest.mark.fault(4)
def test_bytes_that_a_power_cut_has_damaged_are_sent_again(serve: Serve, join: Join, tmp_path: Path) -> None:
    ask, journal = an_ask(["a"]), Journal(tmp_path / "kept")
    header, _ = encode(an_update(0))
    (nonce,) = journal.open(1, Kind.TRAIN, ["a"], 1).nonces
    journal.payload(nonce).write_bytes(bytes(11))
    journal.payload(nonce).with_suffix(".header").write_bytes(header)
    with ThreadPoolExecutor(1) as pool:
        house = House(serve(), pool, journal)
        round, peer = house.train(ask), join(house.serving)
        with pytest.raises(grpc.RpcError, match="send it again from its beginning"):
            peer.answer(nonce, an_update(0))
        assert peer.begin(nonce, header) == 0
        assert peer.answer(nonce, an_update(0)).status == wire.Receipt.ACCEPTED
        assert bits(total(round.result(WAIT))) == bits(summed(ask, {0: an_update(0)}))
        house.fleet.close()
