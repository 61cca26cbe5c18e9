"""What a round has so far survives its server, and nothing else does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.protos.codec import encode
from shoal.protos.errors import RunError
from shoal.protos.messages import Kind, Measurement, Update
from shoal.server.journal import Asked, Journal

HEADER, BUFFERS = encode(Update(np.arange(5.0), 1))
PAYLOAD = b"".join(BUFFERS)
Open = Callable[[], Journal]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """A journal as the next server finds it."""
    made = list[Journal]()

    def make() -> Journal:
        for journal in made:
            journal.close()
        made.append(Journal(tmp_path / "round"))
        return made[-1]

    yield make
    made[-1].close()


def take(journal: Journal, nonce: str) -> None:
    journal.payload(nonce).write_bytes(PAYLOAD)
    journal.take(nonce, HEADER)


def test_what_was_asked_is_asked_again_under_the_same_nonces(reopen: Open) -> None:
    asked = reopen().open(3, Kind.TRAIN, ["b", "a"], 7)

    assert (asked.cohort, asked.population, asked.taken) == (["b", "a"], 7, {})
    assert len(set(asked.nonces)) == 2
    assert reopen().recall(3, Kind.TRAIN) == asked
    assert reopen().open(3, Kind.TRAIN, ["someone", "else"], 2) == asked


def test_rounds_and_kinds_do_not_mix(reopen: Open) -> None:
    journal = reopen()
    training, measuring = (journal.open(3, kind, ["a"], 1) for kind in (Kind.TRAIN, Kind.EVALUATE))

    assert training.nonces != measuring.nonces
    assert journal.recall(4, Kind.TRAIN) is None


def test_answers_are_taken_in_the_order_in_which_they_came(reopen: Open) -> None:
    journal = reopen()
    first, second, third = journal.open(1, Kind.TRAIN, ["a", "b", "c"], 3).nonces
    for nonce in (third, first):
        take(journal, nonce)
    found = reopen().recall(1, Kind.TRAIN)

    assert isinstance(found, Asked)
    assert list(found.taken.items()) == [(third, HEADER), (first, HEADER)]
    assert reopen().payload(first).read_bytes() == PAYLOAD
    assert second not in found.taken


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(PAYLOAD[::-1])])
@pytest.mark.fault(4)
def test_an_answer_that_the_disk_has_lost_is_asked_for_again(reopen: Open, damage: Callable[[Path], object]) -> None:
    journal = reopen()
    nonces = journal.open(1, Kind.TRAIN, ["a", "b"], 2).nonces
    for nonce in nonces:
        take(journal, nonce)
    damage(journal.payload(nonces[0]))

    assert list(reopen().open(1, Kind.TRAIN, [], 0).taken) == [nonces[1]]


def test_payloads_are_read_once_and_only_when_the_round_goes_on(reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = reopen()
    nonces = journal.open(1, Kind.TRAIN, ["a", "b"], 2).nonces
    for nonce in nonces:
        take(journal, nonce)
    read, digest = list[Any](), hashlib.file_digest

    def reading(file: Any, name: str) -> Any:
        read.append(file)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", reading)
    again = reopen()

    assert again.recall(1, Kind.TRAIN) == again.recall(1, Kind.TRAIN)
    assert read == []
    assert again.open(1, Kind.TRAIN, [], 0) == again.recall(1, Kind.TRAIN)
    assert len(read) == 2


def test_who_an_answer_was_proven_to_be_of_is_kept_with_it(reopen: Open) -> None:
    journal = reopen()
    nonces = journal.open(1, Kind.TRAIN, ["a", "b"], 2).nonces
    journal.payload(nonces[1]).write_bytes(PAYLOAD)
    journal.take(nonces[1], HEADER, "CN of b")
    found = reopen().recall(1, Kind.TRAIN)

    assert found is not None and found.proven == {nonces[1]: "CN of b"}


def test_a_journal_of_an_earlier_version_says_what_to_do(reopen: Open) -> None:
    journal = reopen()
    journal._database.execute("ALTER TABLE task DROP COLUMN identity")
    with pytest.raises(RunError, match="delete that folder to begin the round in progress anew"):
        reopen()


def test_an_answer_without_tensors_needs_no_file(reopen: Open) -> None:
    journal, header = reopen(), encode(Measurement({"loss": 1.0}))[0]
    (nonce,) = journal.open(1, Kind.EVALUATE, ["a"], 1).nonces
    journal.take(nonce, header)
    found = reopen().recall(1, Kind.EVALUATE)

    assert found is not None and found.taken == {nonce: header}


def test_rounds_that_a_checkpoint_holds_are_forgotten(reopen: Open) -> None:
    journal = reopen()
    nonces = [journal.open(round, Kind.TRAIN, ["a"], 1).nonces[0] for round in (1, 2)]
    for nonce in nonces:
        take(journal, nonce)
    journal.forget(2)

    assert journal.recall(1, Kind.TRAIN) is None
    assert [path.stem for path in journal.folder.glob("*.payload")] == [nonces[1]]
    assert reopen().recall(2, Kind.TRAIN) is not None


def test_a_round_that_is_made_again_takes_those_after_it_with_it(reopen: Open) -> None:
    journal = reopen()
    for round in (7, 8):
        take(journal, journal.open(round, Kind.TRAIN, ["a"], 1).nonces[0])
    journal.forget(7)  # the checkpoint after round 7 is damaged: that round is made again

    assert journal.recall(7, Kind.TRAIN) is not None
    assert journal.recall(8, Kind.TRAIN) is None


def test_bytes_that_belong_to_nothing_go_when_the_server_comes_back(reopen: Open) -> None:
    journal = reopen()
    (nonce,) = journal.open(1, Kind.TRAIN, ["a"], 1).nonces
    for path in (journal.payload(nonce), journal.payload("0" * 16)):
        path.write_bytes(b"half an ans")
    folder = reopen().folder

    assert [path.stem for path in folder.glob("*.payload")] == [nonce]


@pytest.mark.fault(14)
def test_a_full_disk_takes_nothing_and_goes_on_when_it_has_room(reopen: Open) -> None:
    journal = reopen()
    (nonce,) = journal.open(1, Kind.TRAIN, ["a"], 1).nonces
    journal._database.execute("PRAGMA max_page_count = 1")
    long, _ = encode(Measurement({f"a metric of number {number}": 1.0 for number in range(1000)}))
    with pytest.raises(OSError, match="full"):
        journal.take(nonce, long)
    found = journal.recall(1, Kind.TRAIN)
    journal._database.execute("PRAGMA max_page_count = 1000")
    journal.take(nonce, long)

    assert found is not None and found.taken == {}
    found = reopen().recall(1, Kind.TRAIN)
    assert found is not None and found.taken == {nonce: long}


@pytest.mark.fault(21)
def test_a_torn_tail_is_cut_off(reopen: Open) -> None:
    journal = reopen()
    nonces = journal.open(1, Kind.TRAIN, ["a", "b"], 2).nonces
    for nonce in nonces:
        take(journal, nonce)
    log = journal.folder / "journal.sqlite-wal"
    kept = {path.name: path.read_bytes() for path in journal.folder.iterdir()}
    journal.close()  # which empties the log, as a kill does not
    for name, data in kept.items():
        (journal.folder / name).write_bytes(data[:-100] if name == log.name else data)
    (journal.folder / "journal.sqlite-shm").unlink()
    found = reopen().recall(1, Kind.TRAIN)

    assert found is not None and list(found.taken) == [nonces[0]]


@pytest.mark.fault(21)
def test_a_damaged_journal_says_what_to_do(reopen: Open) -> None:
    journal = reopen()
    journal.close()
    (journal.folder / "journal.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(RunError, match="delete that folder to begin the round in progress anew"):
        reopen()


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="make room or correct its permissions"):
        Journal(tmp_path / "file" / "round")
