"""The loop of rounds over a fleet that is made up: quorum, over-selection, failures, settling, interrupts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.protos.errors import RoundError
from shoal.protos.messages import Failure, Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import PORTION, Coordinator, Plan, Round, start
from shoal.server.fleet import Ask, Part, Report
from shoal.strategies.base import vector
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.selectors import Selector, Uniform
from shoal.strategies.sums import contribute

LAYOUT = Layout((Entry("w", Segment.TRAINABLE, "float64", (2,)),))
EMPTY = torch.zeros(0)
INITIAL = Parameters(LAYOUT, torch.zeros(2, dtype=torch.float64), EMPTY, EMPTY)


class MadeUp:
    """Client "3" moves the model by 3; the clients in ``failing`` fail; answers come in reverse."""

    def __init__(self, clients: int = 10, failing: Collection[str] = ()) -> None:
        self.population = self.reachable = [str(i) for i in range(clients)]
        self.failing, self.asks, self.settled = failing, list[Ask](), list[list[str]]()
        self.note: Mapping[str, int] = {}
        self.begun: dict[int, tuple[Sequence[str], int]] = {}

    def recall(self, round: int) -> tuple[Sequence[str], int] | None:
        return self.begun.get(round)

    def train(self, ask: Ask) -> Iterator[Part]:
        self.asks.append(ask)
        for position, client in reversed([*enumerate(ask.cohort)]):
            if client in self.failing:
                yield Part(
                    position, None, (), [Failure(client, ask.context.round, f"client {client!r} broke", "trace")]
                )
                continue
            update = Update(torch.full((2,), float(client), dtype=torch.float64), 1.0, 1, 0.1, metrics={"loss": 0.5})
            numbers = {"examples": 1.0, "steps": 1.0, "bytes_up": 16.0, "bytes_down": 16.0, "loss": 0.5}
            total = contribute(FedAvg(), ask.state, update, ask.context)
            yield Part(position, total, [Report(client, numbers)])

    def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
        for client in ask.cohort:
            yield Report(client, {"accuracy": int(client) / 10, "examples": 1.0 + int(client)})

    def settle(self, counted: Collection[str]) -> None:
        self.settled.append(list(counted))

    def keep_in(self, folder: Path) -> None:
        return

    def snapshot(self) -> Mapping[str, int]:
        return self.note

    def restore(self, note: Mapping[str, int]) -> None:
        self.note = note

    def close(self) -> None:
        return


class Witness(Callback):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.rounds, self.failures, self.kept = list[Round](), list[Failure](), list[Checkpoint]()
        self.answers, self.evaluations = list[tuple[int, int, int]](), dict[int, list[Report]]()

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self.rounds.append(round)

    def on_failure(self, failure: Failure) -> None:
        self.failures.append(failure)

    def on_answers(self, round: int, answered: int, asked: int) -> None:
        self.answers.append((round, answered, asked))

    def on_evaluations(self, round: int, reports: Sequence[Report]) -> None:
        self.evaluations.setdefault(round, []).extend(reports)

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.kept.append(checkpoint)


def made(fleet: MadeUp, point: Checkpoint | None = None, **plan: Any) -> tuple[Coordinator, Witness]:
    witness = Witness()
    plan = {"rounds": 3, "cohort": 4} | plan
    point = point or start(FedAvg(), Uniform(), INITIAL)
    evaluate = lambda parameters: {"mean": float(parameters.trainable.mean()), "examples": 9.0}  # noqa: E731
    return Coordinator(Plan(**plan), FedAvg(), Uniform(), fleet, point, evaluate, [witness]), witness


def test_a_run() -> None:
    fleet = MadeUp()
    coordinator, witness = made(fleet)
    point = coordinator.run()

    expected = sum(sum(int(client) for client in ask.cohort) / 4 for ask in fleet.asks)
    assert point.round == 3
    assert vector(point.state, "parameters").tolist() == pytest.approx([expected] * 2)
    assert [round.number for round in witness.rounds] == [0, 1, 2, 3]
    assert witness.rounds[0].numbers == {"test_mean": 0.0}
    assert witness.rounds[3].numbers["test_mean"] == pytest.approx(expected)
    assert witness.rounds[1].numbers["train_loss"] == 0.5
    assert witness.rounds[1].numbers["bytes_up"] == 64
    assert [sorted(counted) for counted in fleet.settled] == [sorted(ask.cohort) for ask in fleet.asks]
    assert [kept.round for kept in witness.kept] == [3]


def test_cohorts_differ_by_round_and_not_by_run() -> None:
    first, second, other = MadeUp(), MadeUp(), MadeUp()
    made(first)[0].run()
    made(second)[0].run()
    made(other, seed=1)[0].run()

    assert [ask.cohort for ask in first.asks] == [ask.cohort for ask in second.asks]
    assert first.asks[0].cohort != first.asks[1].cohort
    assert first.asks[0].cohort != other.asks[0].cohort


def test_a_resumed_run_ends_where_an_undisturbed_one_does() -> None:
    whole = made(MadeUp(), rounds=5)[0].run()
    half = made(MadeUp(), rounds=2)[0].run()
    coordinator, witness = made(MadeUp(), point=half, rounds=5)

    assert torch.equal(vector(coordinator.run().state, "parameters"), vector(whole.state, "parameters"))
    assert [round.number for round in witness.rounds] == [3, 4, 5]


@pytest.mark.fault(3)
def test_a_round_that_was_begun_goes_on_with_whom_it_had_asked() -> None:
    fleet = MadeUp(10)
    fleet.begun[2] = ["7", "2", "9", "4"], 12
    made(fleet)[0].run()

    assert fleet.asks[1].cohort == ["7", "2", "9", "4"]
    assert (fleet.asks[1].context.population, len(fleet.settled[1])) == (12, 4)
    assert fleet.asks[2].context.population == 10


@pytest.mark.fault(24)
def test_a_failure_within_the_quorum_is_recorded_and_the_round_goes_on() -> None:
    cohort = made_cohort()
    fleet = MadeUp(failing=cohort[:1])
    coordinator, witness = made(fleet, rounds=1, quorum=0.75)
    point = coordinator.run()

    assert vector(point.state, "parameters")[0] == pytest.approx(sum(int(c) for c in cohort[1:]) / 3)
    assert [failure.client for failure in witness.failures] == cohort[:1]
    assert (witness.rounds[1].numbers["failed"], witness.rounds[1].numbers["counted"]) == (1, 3)
    assert fleet.settled[0] == list(reversed(cohort[1:]))


def test_too_few_updates_end_the_run_and_keep_the_state() -> None:
    coordinator, witness = made(MadeUp(failing=made_cohort()[:1]), rounds=2)
    with pytest.raises(RoundError, match=r"round 1 has 3 of 4 updates and needs 4; first failure: client '\d' broke"):
        coordinator.run()

    assert [kept.round for kept in witness.kept] == [0]


@pytest.mark.fault(24)
def test_over_selection_asks_more_and_needs_the_cohort() -> None:
    fleet = MadeUp()
    made(fleet, rounds=1, over_select=1.5)[0].run()

    assert (len(fleet.asks[0].cohort), fleet.asks[0].goal) == (6, 4)


def test_clients_are_evaluated_when_due_and_at_the_end() -> None:
    coordinator, witness = made(MadeUp(), evaluate_clients_every=2, evaluate_every=0)
    coordinator.run()
    numbers = witness.rounds[2].numbers

    assert {round: len(reports) for round, reports in witness.evaluations.items()} == {2: 10, 3: 10}
    assert (numbers["clients_accuracy"], numbers["clients_accuracy_min"]) == (pytest.approx(0.45), 0)
    assert numbers["clients_accuracy_weighted"] == pytest.approx(sum(i / 10 * (1 + i) for i in range(10)) / 55)
    assert "clients_accuracy" not in witness.rounds[0].numbers


def test_evaluations_are_passed_on_as_they_come() -> None:
    """Of a large population never more than a portion is there; what fails in it is told with it."""

    class Large(MadeUp):
        made, most = 0, 0

        def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
            for number in range(3 * PORTION + 1):
                self.made += 1
                self.most = max(self.most, self.made - seen())
                yield Failure("7", 1, "broke") if number == 7 else Report(str(number), {"x": 1.0, "examples": 2.0})

    def seen() -> int:
        return sum(map(len, witness.evaluations.values())) + len(witness.failures)

    fleet = Large()
    coordinator, witness = made(fleet, rounds=1, evaluate_clients_every=1)
    coordinator.run()

    assert [report.client for report in witness.evaluations[1][6:8]] == ["6", "8"]
    assert (len(witness.evaluations[1]), [f.client for f in witness.failures]) == (3 * PORTION, ["7"])
    assert witness.answers[-1] == (1, 3 * PORTION + 1, 10)
    assert witness.rounds[-1].numbers["clients_x"] == 1.0
    assert fleet.most <= PORTION


@pytest.mark.fault(26)
def test_stop_ends_after_the_round_in_progress() -> None:
    coordinator, witness = made(MadeUp(), rounds=50)
    stopper = Witness()
    stopper.on_round_end = lambda round, point: coordinator.stop() if round.number == 2 else None  # type: ignore[method-assign]
    coordinator._callbacks = [witness, stopper]

    assert coordinator.run().round == 2
    assert [kept.round for kept in witness.kept] == [2]


def test_an_interrupt_abandons_the_round_and_keeps_the_one_before() -> None:
    class Interrupted(MadeUp):
        def train(self, ask: Ask) -> Iterator[Part]:
            parts = super().train(ask)
            yield next(parts)
            if ask.context.round == 2:
                raise KeyboardInterrupt
            yield from parts

    coordinator, witness = made(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        coordinator.run()
    resumed = made(MadeUp(), point=witness.kept[-1])[0].run()

    assert witness.kept[-1].round == 1
    assert torch.equal(vector(resumed.state, "parameters"), vector(made(MadeUp())[0].run().state, "parameters"))


def test_a_model_that_is_not_finite_ends_the_run() -> None:
    point = start(FedAvg(), Uniform(), replace(INITIAL, trainable=torch.tensor([0.0, torch.inf], dtype=torch.float64)))
    coordinator, _ = made(MadeUp(), point=point)
    with pytest.raises(RoundError, match=r"not finite after round 1 \(tensor 'w'\)"):
        coordinator.run()


def test_over_selection_rounds_as_people_do() -> None:
    fleet = MadeUp(clients=200)
    made(fleet, rounds=1, cohort=100, over_select=1.1)[0].run()

    assert len(fleet.asks[0].cohort) == 110


def test_a_selector_may_not_choose_a_client_twice() -> None:
    class Twice(Selector):
        def select(self, *_: Any) -> Sequence[str]:
            return ["1", "2", "1"]

    coordinator, _ = made(MadeUp())
    coordinator._selector = Twice()
    with pytest.raises(RoundError, match="not all different"):
        coordinator.run()


def test_clients_are_evaluated_with_what_the_round_has_settled() -> None:
    class Ordered(MadeUp):
        def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
            assert len(self.settled) == ask.context.round
            return super().evaluate(ask)

    made(Ordered(), evaluate_clients_every=1)[0].run()


def test_an_interrupted_evaluation_leaves_the_round_standing() -> None:
    class Interrupted(MadeUp):
        def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
            raise KeyboardInterrupt

    coordinator, witness = made(Interrupted(), evaluate_clients_every=2)
    with pytest.raises(KeyboardInterrupt):
        coordinator.run()

    assert witness.kept[-1].round == 2
    assert [round.number for round in witness.rounds] == [0, 1, 2]


def test_checkpoints_come_at_their_interval() -> None:
    coordinator, witness = made(MadeUp(), rounds=5, checkpoint_every=2)
    coordinator.run()

    assert [kept.round for kept in witness.kept] == [2, 4, 5]


def made_cohort() -> list[str]:
    """The first round's cohort under seed 0."""
    fleet = MadeUp()
    made(fleet, rounds=1)[0].run()
    return list(fleet.asks[0].cohort)
