"""What a client keeps on disk, whatever its server counts and whenever it is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.client.store import Outbox, Store, keep_state, kept_state
from shoal.protos.errors import ConnectionRefused, DataError
from shoal.protos.files import write_whole


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, "a")
    made.claim()
    yield made
    made.close()


@pytest.fixture
def states(store: Store) -> Path:
    return store.run("run")


def rounds(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


# --- states -----------------------------------------------------------------------------------------------------------


def test_the_state_of_the_counted_update_is_the_true_one(states: Path) -> None:
    keep_state(states, 1, b"one")
    keep_state(states, 2, b"two")

    assert kept_state(states, 2) == b"two"
    assert kept_state(states, 1) == b"one"
    assert kept_state(states, 0) is None


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_a_damaged_state_is_not_taken_for_the_true_one(states: Path, place: int) -> None:
    keep_state(states, 1, b"one")
    (path,) = states.iterdir()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)

    with pytest.raises(DataError, match=r"00001' is damaged"):
        kept_state(states, 1)


def test_an_update_that_was_not_counted_moves_nothing(states: Path) -> None:
    keep_state(states, 3, b"counted")
    for late in (4, 5, 6):
        keep_state(states, late, b"too late")
        assert kept_state(states, 3) == b"counted"


def test_a_client_that_is_always_late_does_not_fill_its_disk(states: Path) -> None:
    keep_state(states, 1, b"counted")
    for late in range(2, 30):
        kept_state(states, 1)
        keep_state(states, late, b"too late")

    assert len(rounds(states)) <= 3


def test_a_round_that_is_played_again_replaces_its_state(states: Path) -> None:
    keep_state(states, 7, b"of the first attempt")
    keep_state(states, 7, b"of the second")

    assert kept_state(states, 7) == b"of the second"


def test_a_server_may_go_back_a_checkpoint(states: Path) -> None:
    for round in range(1, 8):
        kept_state(states, round - 1)
        keep_state(states, round, b"%d" % round)

    assert kept_state(states, 7) == b"7"
    assert kept_state(states, 6) == b"6"


def test_old_states_go(states: Path) -> None:
    for round in range(1, 100):
        keep_state(states, round, b"")
        kept_state(states, round)

    assert rounds(states) == [97, 98, 99]


def test_rounds_beyond_five_digits_are_sorted_as_numbers(states: Path) -> None:
    for round in (99_998, 99_999, 100_000, 100_001):
        keep_state(states, round, b"%d" % round)
        kept_state(states, round)

    assert kept_state(states, 100_001) == b"100001"
    assert rounds(states) == [99_999, 100_000, 100_001]


@pytest.mark.fault(2)
def test_what_a_killed_process_left_half_written_is_no_state(states: Path) -> None:
    keep_state(states, 1, b"whole")
    for name in (".00002.part", "00002.part", "notes"):
        (states / name).write_bytes(b"half")

    assert kept_state(states, 1) == b"whole"
    assert kept_state(states, 2) is None


# --- runs -------------------------------------------------------------------------------------------------------------


def test_states_of_the_newest_runs_are_kept(store: Store) -> None:
    for age, run in enumerate("fedcba"):
        keep_state(store.run(run), 1, run.encode())
        os.utime(store.path / "runs" / run, (age, age))
    store.run("a")

    assert sorted(path.name for path in (store.path / "runs").iterdir()) == ["a", "b", "c"]
    assert kept_state(store.run("b"), 1) == b"b"


def test_the_run_at_hand_is_never_among_those_that_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in "abcd":
        store.run(run)
        os.utime(store.path / "runs" / run, (2**33, 2**33))  # a clock that was wrong

    assert store.run("e").is_dir()


def test_runs_have_states_of_their_own(store: Store) -> None:
    keep_state(store.run("one"), 1, b"one")

    assert kept_state(store.run("two"), 1) is None


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_process(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefused, match=r"another process is client 'a' with the state in .*/a; stop it, or"):
        Store(tmp_path, "a").claim()

    other = Store(tmp_path, "b")
    other.claim()
    other.close()


def test_a_folder_is_free_again_when_its_process_has_left(tmp_path: Path) -> None:
    for _ in range(2):
        store = Store(tmp_path, "a")
        store.claim()
        store.close()


@pytest.mark.parametrize("name", ["..", ".", "../../etc", "/etc/passwd", "a/b", "a\\b", ".hidden", "%2E%2E", "é" * 200])
def test_any_name_stays_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, name)
    store.claim()
    store.close()

    assert store.path.parent == tmp_path / "clients"
    assert store.path.resolve().parent == (tmp_path / "clients").resolve()
    assert store.path.is_dir()


def test_different_names_have_different_folders(tmp_path: Path) -> None:
    names = ["a/b", "a%2Fb", "a.b", "a%2Eb", "..", "%2E%2E", "x" * 199, "x" * 200, "é" * 199, "é" * 200]

    assert len({Store(tmp_path, name).path for name in names}) == len(names)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("no folder")
    with pytest.raises(ConnectionRefused, match=r"'.*/clients/a' cannot be written \(Not a directory\); set --state"):
        Store(tmp_path, "a").claim()


# --- the outbox -------------------------------------------------------------------------------------------------------


@pytest.fixture
def outbox(store: Store) -> Outbox:
    return store.outbox


def test_an_answer_is_there_when_both_its_parts_are(outbox: Outbox) -> None:
    before = outbox.holds("n")
    outbox.put("n", b"header", [memoryview(b"pay"), memoryview(b"load")])

    assert (before, outbox.holds("n")) == (False, True)
    assert (outbox.header("n").read_bytes(), outbox.payload("n").read_bytes()) == (b"header", b"payload")


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.fault(2)
def test_an_answer_that_was_not_written_to_its_end_is_not_there(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls = list[Path]()

    def cut(path: Path, parts: list[memoryview]) -> None:
        calls.append(path)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        write_whole(path, parts)

    monkeypatch.setattr("shoal.client.store.write_whole", cut)
    with pytest.raises(OSError, match="No space left"):
        outbox.put("n", b"header", [memoryview(b"payload")])

    assert not outbox.holds("n")


def test_answers_to_other_tasks_are_dropped(outbox: Outbox) -> None:
    for nonce in ("old", "new"):
        outbox.put(nonce, b"", [])
        (outbox.path / f"{nonce}.task").write_bytes(b"")
        (outbox.path / f".{nonce}.payload.part").write_bytes(b"")
    outbox.keep_only("new")

    assert sorted(path.name for path in outbox.path.iterdir()) == [
        ".new.payload.part", "new.header", "new.payload", "new.task",
    ]  # fmt: skip
