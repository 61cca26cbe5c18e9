"""Clients' states on disk: the same bits with any cache, whatever dies when; and no more than checkpoints need."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from shoal import Experiment, LocalTraining, Run, Scaffold, resume
from shoal.compose import Composition
from shoal.protos.errors import RunError
from shoal.server.runs import RunFolder
from shoal.simulations import states as module
from shoal.simulations.federated import ArrayData
from shoal.simulations.fleet import SimulatedFleet
from shoal.simulations.states import ClientStates

SIZE = 400  # bytes of one state
NAMES = ["a", "A", "a/b", "..", "", "\0", "é", "e\u0301", "\ud800", "x" * 5000]


def state(value: float) -> dict[str, Tensor]:
    return {"control": torch.full((100,), value)}


def value(found: Mapping[str, Tensor] | None) -> float | None:
    return None if found is None else float(found["control"][0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "states.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., ClientStates]]:
    """Opens the file; what an earlier call opened is closed, as by the end of its process."""
    open_ones = list[ClientStates]()

    def make(memory: int = 2**20, at: Path | None = path) -> ClientStates:
        for earlier in open_ones:
            earlier.close()
        open_ones.append(ClientStates(at, memory))
        return open_ones[-1]

    yield make
    for one in open_ones:
        one.close()


def test_every_kind_of_tensor_comes_back_as_it_was(opened: Callable[..., ClientStates]) -> None:
    mine = {
        "float32": torch.tensor([1.0, -0.0, 1e-42, torch.nan, -torch.inf]),
        "float64": torch.tensor([[0.1 + 0.2]], dtype=torch.float64),
        "int64": torch.tensor(2**62),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(6.0).view(2, 3).T,
        "": torch.arange(10.0)[3:5],
    }
    states = opened(memory=0)
    states.put(1, {"a": mine})
    found = states.get("a")

    assert found is not None and found.keys() == mine.keys()
    for name, tensor in mine.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("memory", [0, 3 * SIZE, 2**20])
def test_names_may_hold_any_character(opened: Callable[..., ClientStates], memory: int) -> None:
    states = opened(memory)
    states.put(1, {name: state(number) for number, name in enumerate(NAMES)})

    assert [value(states.get(name)) for name in NAMES] == [*range(len(NAMES))]
    assert states.clients() == {*NAMES}
    assert states.get("b") is None


def test_what_is_put_is_copied(opened: Callable[..., ClientStates]) -> None:
    """Workers lend the memory that their answers lie in, and use it again."""
    states, lent = opened(), state(1.0)
    states.put(1, {"a": lent})
    lent["control"].zero_()

    assert value(states.get("a")) == 1.0


def test_memory_holds_what_was_used_last(opened: Callable[..., ClientStates]) -> None:
    states = opened(memory=3 * SIZE)
    states.put(1, {name: state(0.0) for name in "abc"})
    states.get("a")
    states.put(2, {"d": state(0.0)})
    states.get("d")

    assert list(states._cache) == ["c", "a", "d"]
    for name in "abcd" * 3:
        assert states.get(name) is not None
        assert states._bytes == sum(tensor.nbytes for mine in states._cache.values() for tensor in mine.values())
        assert states._bytes <= 4 * SIZE  # what is allowed, and the one that was asked for


def test_without_states_there_is_no_file(opened: Callable[..., ClientStates], path: Path) -> None:
    states = opened()
    states.restore(0)
    states.put(1, {})

    assert (states.keep(), states.get("a"), states.clients()) == (0, None, set())
    assert not path.exists()


def test_without_a_folder_nothing_is_promised(opened: Callable[..., ClientStates], tmp_path: Path) -> None:
    states = opened(memory=0, at=None)
    states.put(1, {"a": state(1.0)})

    assert (value(states.get("a")), states.keep()) == (1.0, 0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="client states of round 3 are not in a temporary file"):
        opened(at=None).restore(3)


def test_a_state_of_many_pieces(opened: Callable[..., ClientStates], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 100)
    states = opened(memory=0)
    mine = {"control": torch.randn(1000)}
    states.put(1, {"a": mine, "b": state(2.0)})
    found = states.get("a")

    assert found is not None and torch.equal(found["control"], mine["control"])
    assert value(states.get("b")) == 2.0


CLIENT = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(st.just("put"), st.dictionaries(CLIENT, st.integers(0, 1000), max_size=4)),
    st.tuples(st.just("get"), CLIENT),
    st.tuples(st.just("keep"), st.none()),
    st.tuples(st.just("die"), st.none()),
    st.tuples(st.just("go back"), st.integers(0, 1)),
)


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(STEPS, max_size=40), memory=st.sampled_from([0, SIZE, 3 * SIZE, 2**20]))
def test_it_is_a_dictionary_that_remembers_two_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]], memory: int
) -> None:
    path = tmp_path_factory.mktemp("states") / "states.sqlite"
    states, now, round = ClientStates(path, memory), dict[str, int](), 0
    kept: list[tuple[int, dict[str, int]]] = [(0, {})]  # what the checkpoints on disk saw
    for what, argument in steps:
        if what == "put":
            round += 1
            states.put(round, {client: state(number) for client, number in argument.items()})
            now |= argument
        elif what == "get":
            assert value(states.get(argument)) == now.get(argument)
        elif what == "keep":
            noted = states.keep()
            assert noted == round or (noted, now) == (0, {})
            kept = kept if noted == kept[-1][0] else [*kept, (noted, dict(now))][-2:]
        else:
            if what == "die":
                states.close()
                states = ClientStates(path, memory)
            elif len(kept) > argument:
                kept = kept[: len(kept) - argument]
            round, now = kept[-1][0], dict(kept[-1][1])
            states.restore(round)
    assert {client: value(states.get(client)) for client in states.clients()} == now
    states.close()


# --- what lies on disk ------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(path)) as file:
        return [(key.decode(), round) for key, round in file.execute("SELECT client, round FROM states ORDER BY 2, 1")]


def test_what_no_checkpoint_needs_goes_with_the_next(opened: Callable[..., ClientStates], path: Path) -> None:
    """Checkpoints after the rounds 2, 4, 6, 8; only the first changed "b"; the file says what is left."""
    states = opened(memory=0)
    states.put(1, {"a": state(1.0), "b": state(1.0)})
    for number in range(2, 9):
        states.put(number, {"a": state(number)})
        states.get("a")  # for which the last round's states leave a memory of nothing
        if number % 2 == 0:
            states.keep()
    states.close()

    # With 8 came what 4 and 6, until then the only ones, do not need: all before 4 of "a". Then 8 was written.
    assert rows(path) == [("b", 1), ("a", 4), ("a", 5), ("a", 6), ("a", 7), ("a", 8)]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is written")
def test_a_checkpoint_costs_what_has_changed(opened: Callable[..., ClientStates], path: Path) -> None:
    states = opened()
    states.put(1, {str(number): state(1.0) for number in range(5000)})
    states.keep()
    before, written = path.stat().st_size, int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])
    states.put(2, {"7": state(2.0)})
    states.keep()
    now = int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    assert before > 5000 * SIZE
    assert now - written < before / 5


def test_space_is_used_again(opened: Callable[..., ClientStates], path: Path) -> None:
    """Two checkpoints and the next: so much, however long the run is."""
    states = opened()
    for number in range(1, 30):
        states.put(number, {str(client): {"control": torch.randn(10_000)} for client in range(20)})
        states.keep()

    assert path.stat().st_size < 4 * 20 * 40_000


# --- what dies when ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_was_kept(path: Path, opened: Callable[..., ClientStates]) -> None:
    """It dies with more on disk than it had kept: a cache of nothing, and as many bytes as make SQLite write them."""
    code = f"""
        import os, pathlib, signal, torch
        from shoal.simulations.states import ClientStates

        states = ClientStates(pathlib.Path({str(path)!r}), memory=0)
        for number in (1, 2, 3, 4):
            states.put(number, {{str(c): {{"control": torch.full((50_000,), float(number))}} for c in range(30)}})
            states.get("0")
            if number < 3:
                states.keep()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    journal = path.with_name("states.sqlite-journal")

    assert done.returncode == -signal.SIGKILL
    assert journal.stat().st_size > 0 and path.stat().st_size > 3 * 30 * 200_000
    for round in (2, 1):
        states = opened()
        states.restore(round)
        assert {value(states.get(str(client))) for client in range(30)} == {float(round)}


def test_a_checkpoint_that_was_not_finished_is_gone_back_from(opened: Callable[..., ClientStates]) -> None:
    """The states of round 3 were safe already when the checkpoint's own files were lost."""
    states = opened()
    for number in (1, 2, 3):
        states.put(number, {"a": state(number), f"only in {number}": state(number)})
        states.keep()
    states = opened()
    states.restore(2)

    assert value(states.get("a")) == 2.0
    assert states.clients() == {"a", "only in 1", "only in 2"}
    states.put(3, {"a": state(33.0)})
    assert states.keep() == 3
    states = opened()
    states.restore(3)
    assert value(states.get("a")) == 33.0


def test_a_file_that_is_damaged_is_said(opened: Callable[..., ClientStates], path: Path) -> None:
    states = opened()
    states.put(1, {"a": state(1.0), "b": {"control": torch.full((100,), 2.0)}})
    states.keep()
    states.close()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(state(1.0)["control"].numpy().tobytes(), state(3.0)["control"].numpy().tobytes()))
    states = opened()
    states.restore(1)

    assert value(states.get("b")) == 2.0
    with pytest.raises(RunError, match=r"the state of client 'a' in .*states\.sqlite is damaged"):
        states.get("a")
    for damage in (b"no database" * 1000, whole[: len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(RunError, match=r"client states cannot be kept in .*states\.sqlite \("):
            opened().restore(1)
            opened().get("a")


def test_a_file_of_another_run_is_refused(opened: Callable[..., ClientStates], path: Path) -> None:
    with pytest.raises(RunError, match=r"client states of round 2 are not in .*; put back the file that belongs to"):
        opened().restore(2)
    states = opened()
    states.put(1, {"a": state(1.0)})
    states.keep()
    with pytest.raises(RunError, match="client states of round 2 are not in"):
        opened().restore(2)


def test_there_is_one_writer(path: Path, opened: Callable[..., ClientStates], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    states = opened()
    states.put(1, {"a": state(1.0)})
    states.keep()
    with closing(ClientStates(path)) as other, pytest.raises(RunError, match="database is locked"):
        other.restore(1)


# --- whole runs -------------------------------------------------------------------------------------------------------


def experiment(**changes: Any) -> Experiment:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 4, generator=generator), torch.randint(0, 3, (120,), generator=generator)
    data = ArrayData(x, y, {f"client {i}": (6 * i, 6 * i + 4, 6 * i + 6) for i in range(20)}, classes=3)
    fields: dict[str, Any] = {"model": lambda: nn.Linear(4, 3), "data": data, "strategy": Scaffold()}
    fields |= {"rounds": 9, "cohort": 6, "checkpoint_every": 2, "local": LocalTraining(lr=0.1)}
    return Experiment(**(fields | changes))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1000), nn.Linear(1000, 3))


def at_the_end(folder: Path, round: int) -> dict[str, bytes]:
    """All that a checkpoint comes to, and all that it notes of clients."""
    point = RunFolder(folder).latest()
    assert point is not None and point.round == round
    found = {name: torch.as_tensor(tensor).numpy().tobytes() for name, tensor in point.state.items()}
    with closing(ClientStates(folder / "states.sqlite")) as states:
        states.restore(round)
        for client in states.clients():
            found |= {f"{client} {n}": tensor.numpy().tobytes() for n, tensor in (states.get(client) or {}).items()}
    return found


def play(out: Path, memory: int, **changes: Any) -> Path:
    """A run or, where there is one, what is left of it, with a cache of so many bytes."""
    composition, folder = Composition(experiment(**changes)), RunFolder(out)
    out.mkdir(exist_ok=True)
    with closing(folder), closing(SimulatedFleet(composition.assignment, memory=memory)) as fleet:
        fleet.keep_in(out)
        composition.coordinator(fleet, folder.latest() or composition.start(), [folder]).run()
    return out


@pytest.mark.parametrize("memory", [0, 200])  # bytes: none, and three states of sixty
def test_a_small_cache_leaves_no_trace(tmp_path: Path, memory: int) -> None:
    small, large = play(tmp_path / "small", memory), play(tmp_path / "large", 2**20)

    assert at_the_end(small, 9) == at_the_end(large, 9)
    assert len(at_the_end(small, 9)) > 15


@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_damaged_checkpoint_is_passed_over_with_its_states(tmp_path: Path, memory: int) -> None:
    whole, broken = play(tmp_path / "whole", memory), play(tmp_path / "broken", memory, rounds=6)
    (broken / "checkpoints/round-00006/tensors.safetensors").write_bytes(b"")
    point = RunFolder(broken).latest()
    play(broken, memory)

    assert point is not None and point.round == 4
    assert at_the_end(broken, 9) == at_the_end(whole, 9)


def test_a_run_whose_states_are_gone_is_not_resumed(tmp_path: Path) -> None:
    run = experiment(rounds=4).simulate(workers=0, out=tmp_path, progress="none")
    (run.path / "states.sqlite").unlink()
    with pytest.raises(RunError, match="client states of round 4 are not in"):
        resume(run.path, rounds=6, experiment=experiment(rounds=4), progress="none")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_with_no_states(tmp_path: Path) -> None:
    whole = experiment(rounds=4).simulate(workers=0, out=tmp_path, progress="none")
    run = experiment(rounds=4).simulate(workers=0, out=tmp_path, progress="none")
    shutil.rmtree(run.path / "checkpoints")
    resume(run.path, experiment=experiment(rounds=4), progress="none")

    assert at_the_end(run.path, 4) == at_the_end(whole.path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_run_for_which_there_is_no_room_goes_on_when_there_is(tmp_path: Path, memory: int) -> None:
    """A file may grow to so many bytes only: writing fails in a round or at a checkpoint, after one that went well."""
    code = f"""
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_states import play, wide

        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))
        play(Path({str(tmp_path / "broken")!r}), {memory}, model=wide)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    kept = RunFolder(tmp_path / "broken").latest()

    assert "RunError: client states cannot be kept in" in said.stderr and "make room" in said.stderr
    assert kept is not None and 2 <= kept.round < 9
    broken, whole = (play(tmp_path / name, memory, model=wide) for name in ("broken", "whole"))
    assert at_the_end(broken, 9) == at_the_end(whole, 9)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path, workers: int) -> None:
    """A real process, killed in a round after some checkpoints."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_states import experiment

        experiment(rounds=1000).simulate(
            engine="lean", workers={workers}, out={str(tmp_path)!r}, progress="json"
        )
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any('"round": 7' in line for line in process.stdout)
    process.kill()
    process.wait()
    process.stdout.close()
    run = Run(tmp_path / "1")
    kept = RunFolder(run.path).latest()
    assert kept is not None and kept.round >= 6
    rounds = kept.round + 5
    resume(run.path, rounds=rounds, experiment=experiment(), progress="none")
    whole = experiment(rounds=rounds).simulate(engine="lean", workers=0, out=tmp_path, progress="none")

    assert at_the_end(run.path, rounds) == at_the_end(whole.path, rounds)
