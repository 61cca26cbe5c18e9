"""The program that trains, from outside: jobs in, files out, whatever is wrong with a job or a user's code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn

from shoal.client.data import Shard
from shoal.client.models import linear
from shoal.client.net import parameters_of, to_numpy
from shoal.client.process import command, environment
from shoal.client.sources import write_shard
from shoal.client.store import Outbox, kept_state
from shoal.protos import fleet_pb2 as wire
from shoal.protos.assignment import Assignment
from shoal.protos.codec import decode_measurement, decode_update, encode
from shoal.protos.messages import Kind, Task
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.scaffold import Scaffold

MODEL = linear((3,), 2)  # as the server has it

pytestmark = pytest.mark.slow

MINE = """
import torch
from torch import nn
import shoal

class Raises(shoal.Client):
    def fit(self, work):
        raise KeyError("column 'age'")

class Odd(shoal.Client):
    def fit(self, work):
        raise ValueError("no file caf\\udce9.csv" + "!" * 50_000)

class Breaks(shoal.Client):
    def fit(self, work):
        breakpoint()

class Quits(shoal.Client):
    def fit(self, work):
        raise SystemExit("enough")

class Exhausted(shoal.Client):
    def fit(self, work):
        bytearray(2**60)

class Loud(shoal.Client):
    def fit(self, work):
        print("{}", flush=True)
        work.step(work.model(work.data.x).sum(), torch.optim.SGD(work.model.parameters(), lr=0.1))

class NaN(shoal.Client):
    def fit(self, work):
        with torch.no_grad():
            for weight in work.model.parameters():
                weight.fill_(float("nan"))
        work.steps = 1

def frozen(value: float):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    nn.init.constant_(model[0].weight, value)
    return model
"""


class Place:
    """A folder of one client, a worker process beside it, and jobs for it."""

    def __init__(self, folder: Path, worker: subprocess.Popen[bytes]) -> None:
        self.folder, self._worker, self._jobs = folder, worker, 0
        rng = np.random.default_rng(0)
        x, y = torch.from_numpy(rng.normal(size=(8, 3)).astype("float32")), torch.from_numpy(rng.integers(0, 2, 8))
        self.shard = write_shard(folder, "a", Shard(x, y, x[:4], y[:4]))
        (folder / "mine.py").write_text(MINE)
        (folder / "states").mkdir(exist_ok=True)
        (folder / "outbox").mkdir(exist_ok=True)

    @property
    def mine(self) -> str:
        return str(self.folder / "mine.py")

    def call(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(job).encode() + b"\n")
        self._worker.stdin.flush()
        return dict(json.loads(self._worker.stdout.readline()))

    def look(self, **changes: Any) -> dict[str, Any]:
        data = {"path": str(self.shard)}
        return self.call({"kind": "look", "client": "a", "data": data, "allow": [], "device": "cpu"} | changes)

    def play(
        self,
        kind: Kind = Kind.TRAIN,
        model: nn.Module | None = None,
        strategy: FedAvg | Scaffold | None = None,
        round: int = 1,
        assignment: dict[str, Any] | None = None,
        header: bytes | None = None,
        **changes: Any,
    ) -> wire.Header:
        """The header of the answer; ``model`` is the server's, ``assignment`` what the client is told."""
        self._jobs += 1
        strategy, parameters = strategy or FedAvg(), parameters_of(model or MODEL)
        sent = strategy.send(strategy.init(parameters.trainable))
        task = Task(
            kind,
            round,
            round - 1,
            parameters.map(to_numpy),
            {name: to_numpy(tensor) for name, tensor in sent.tensors.items()},
            sent.settings,
            strategy.reply(sent),
        )
        made, buffers = encode(task)
        told: dict[str, Any] = {
            "strategy": {"name": type(strategy).__name__.lower()},
            "local": {"lr": 0.1},
            "model": {"name": "linear", "shape": [3], "classes": 2},
            "client": None,
            "seed": 0,
            "dtype": "float32",
        } | (assignment or {})
        names = {key: self.folder / f"{self._jobs}.{key}" for key in ("assignment", "task", "payload")}
        names["assignment"].write_bytes(Assignment.model_validate(told).encode())
        names["task"].write_bytes(made if header is None else header)
        names["payload"].write_bytes(b"".join(buffers))
        job = {
            **{key: str(path) for key, path in names.items()},
            **{"kind": "play", "nonce": f"n{self._jobs}", "client": "a", "round": round, "counted": 0},
            **{"states": str(self.folder / "states"), "outbox": str(self.folder / "outbox")},
            **{"data": {"path": str(self.shard)}, "allow": [], "device": "cpu"},
        }
        assert self.call(job | changes) == {}
        return wire.Header.FromString(Outbox(self.folder / "outbox").header(f"n{self._jobs}").read_bytes())

    def payload(self) -> bytes:
        """Of the last answer."""
        return Outbox(self.folder / "outbox").payload(f"n{self._jobs}").read_bytes()

    def fails(self, **arguments: Any) -> tuple[str, str]:
        """The reason and the traceback of the failure that comes instead of an answer."""
        header = self.play(**arguments)
        assert header.WhichOneof("content") == "failure", header
        assert (header.failure.client, header.failure.round) == ("a", arguments.get("round", 1))
        return header.failure.reason, header.failure.traceback


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """One process for all tests: what goes wrong with one job must not reach the next."""
    with subprocess.Popen(
        command("shoal.client.worker"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        yield process
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.fixture
def place(tmp_path: Path, worker: subprocess.Popen[bytes]) -> Place:
    return Place(tmp_path, worker)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_task_to_train_gives_an_update(place: Place) -> None:
    header = place.play()
    update = decode_update(header.SerializeToString(), place.payload())

    assert (update.examples, update.delta.shape) == (8, (8,))
    assert np.abs(update.delta).max() > 0


def test_the_same_task_gives_the_same_bits(place: Place) -> None:
    first = (place.play().SerializeToString(), place.payload())
    place.play(round=2)

    assert (place.play().SerializeToString(), place.payload()) == first


def test_a_task_to_evaluate_gives_a_measurement(place: Place) -> None:
    measured = decode_measurement(place.play(Kind.EVALUATE).SerializeToString()).metrics

    assert measured["examples"] == 4
    assert measured["loss"] > 0


def test_who_holds_nothing_out_measures_nothing(place: Place) -> None:
    shard = write_shard(place.folder, "b", Shard(torch.ones(2, 3), torch.tensor([0, 1])))
    header = place.play(Kind.EVALUATE, data={"path": str(shard)})

    assert not decode_measurement(header.SerializeToString()).metrics


def test_a_state_is_kept_with_its_update(place: Place) -> None:
    place.play(strategy=Scaffold(), round=3)

    assert [path.name for path in (place.folder / "states").iterdir()] == ["00003"]
    kept = kept_state(place.folder / "states", 3)
    assert kept is not None and load(kept).keys() == Scaffold().init_client(torch.ones(8)).keys()


def test_the_state_that_was_counted_is_the_one_to_train_with(place: Place) -> None:
    place.play(strategy=Scaffold(), round=1)
    place.play(strategy=Scaffold(), round=2, counted=1)
    as_counted = place.payload()
    place.play(strategy=Scaffold(), round=2, counted=0)
    as_new = place.payload()
    place.play(strategy=Scaffold(), round=1)
    place.play(strategy=Scaffold(), round=2, counted=1)

    assert place.payload() == as_counted != as_new


def test_a_state_that_is_lost_is_not_invented(place: Place) -> None:
    reason, trace = place.fails(strategy=Scaffold(), round=8, counted=7)

    assert reason.startswith("this client's state of round 7 is not in ")
    assert reason.endswith("; start the client with the --state folder it had, or under another name")
    assert trace == ""


def test_a_strategy_without_a_state_misses_none(place: Place) -> None:
    assert place.play(round=8, counted=7).WhichOneof("content") == "update"
    assert not list((place.folder / "states").iterdir())


# --- what the server wants and this client does not have --------------------------------------------------------------


@pytest.mark.fault(12)
def test_a_model_of_another_form(place: Place) -> None:
    reason, trace = place.fails(model=linear((3,), 5))

    assert reason.startswith("the model that this client builds is not the server's (")
    assert reason.endswith("; install the same version of the model's code on both sides")
    assert trace == ""


def test_frozen_tensors_with_other_values(place: Place) -> None:
    frozen: Any = {"model": {"name": "mine.py:frozen", "value": 0.5}}
    theirs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    theirs[0].requires_grad_(False)
    reason, _ = place.fails(model=theirs, assignment=frozen, allow=[f"{place.mine}:frozen"])

    assert reason == "the model's frozen tensors differ from the server's; install the same weights on both"


@pytest.mark.parametrize("allow", [[], ["other.py:Raises"], ["mine.py:Loud"]])
def test_code_that_the_owner_did_not_allow_is_not_even_imported(place: Place, allow: list[str]) -> None:
    (place.folder / "mine.py").write_text(f"open({str(place.folder / 'imported')!r}, 'w')")
    reason, _ = place.fails(assignment={"client": {"name": "mine.py:Raises"}}, allow=allow)

    assert reason.startswith("the server asks for 'mine.py:Raises', which ")
    assert "owner did not allow" in reason and "--allow mine.py:Raises" in reason
    assert not (place.folder / "imported").exists()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"strategy": {"name": "fedfoo"}}, "there is no 'fedfoo' in strategies"),
        ({"model": {"name": "linear", "shape": [3]}}, "'model.classes' is missing; 'linear' needs it"),
        ({"local": {"lr": -1.0}}, "lr"),
        ({"local": {"lr": 0.1, "loss": "os:system"}}, "the server asks for 'os:system', which "),
    ],
)
@pytest.mark.fault(22)
def test_an_assignment_that_this_installation_cannot_follow(
    place: Place, assignment: dict[str, Any], message: str
) -> None:
    reason, trace = place.fails(assignment=assignment)

    assert message in reason
    assert trace == ""


@pytest.mark.parametrize("kind", [Kind.PROBE, Kind.PHASE])
@pytest.mark.fault(22)
def test_a_task_of_a_kind_of_the_future(place: Place, kind: Kind) -> None:
    assert place.fails(kind=kind)[0] == f"the server asks for a task of kind {kind!r}; upgrade this client"


def test_a_task_that_cannot_be_read(place: Place) -> None:
    assert "the header of the task is damaged" in place.fails(header=b"\xff" * 20)[0]


def test_data_that_went_away(place: Place) -> None:
    reason, _ = place.fails(data={"path": str(place.folder / "gone.npz")})

    assert "gone.npz' cannot be read as a shard (No such file or directory)" in reason


# --- a user's code ----------------------------------------------------------------------------------------------------


def played_by(place: Place, name: str) -> dict[str, Any]:
    return {"assignment": {"client": {"name": f"mine.py:{name}"}}, "allow": [f"{place.mine}:{name}"]}


@pytest.mark.fault(23)
def test_an_error_of_a_clients_own_code_comes_with_its_place(place: Place) -> None:
    reason, trace = place.fails(**played_by(place, "Raises"), round=5)

    assert reason == "client 'a' raised KeyError in round 5: \"column 'age'\""
    assert f'File "{place.mine}"' in trace
    assert "raise KeyError(\"column 'age'\")" in trace


def test_an_error_of_any_length_and_in_any_characters_can_be_sent(place: Place) -> None:
    reason, trace = place.fails(**played_by(place, "Odd"))

    assert reason.startswith("client 'a' raised ValueError in round 1: no file caf?.csv!!!")
    assert len(reason) == len(trace) == 20_000


def test_a_breakpoint_that_was_forgotten_waits_for_nobody(place: Place) -> None:
    assert "raised BdbQuit in round 1" in place.fails(**played_by(place, "Breaks"))[0]


@pytest.mark.fault(23)
def test_code_that_cannot_be_imported_says_which_line(place: Place) -> None:
    broken = place.folder / "broken.py"
    broken.write_text("import shoal\nimport a_library_that_is_not_there\n")
    name = {"assignment": {"client": {"name": "broken.py:Mine"}}, "allow": [f"{broken}:Mine"]}
    reason, _ = place.fails(**name)

    assert "broken.py" in reason and "line 2" in reason and "a_library_that_is_not_there" in reason


@pytest.mark.fault(23)
def test_a_program_that_would_leave_has_failed(place: Place) -> None:
    assert "raised SystemExit in round 1: enough" in place.fails(**played_by(place, "Quits"))[0]


@pytest.mark.fault(23)
def test_want_of_memory_is_an_error_like_others(place: Place) -> None:
    assert "raised MemoryError in round 1" in place.fails(**played_by(place, "Exhausted"))[0]


def test_what_a_client_prints_is_no_answer(place: Place) -> None:
    assert place.play(**played_by(place, "Loud")).WhichOneof("content") == "update"


@pytest.mark.fault(8)
def test_an_update_that_is_not_finite_does_not_leave(place: Place) -> None:
    reason, _ = place.fails(**played_by(place, "NaN"))

    assert "holds nan in its delta in tensor '1.weight'" in reason


# --- a look -----------------------------------------------------------------------------------------------------------


def test_a_look_counts_examples(place: Place) -> None:
    assert place.look() == {"about": "8 examples to train on, 4 held out"}
    assert place.look(client=None, data={}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "none.npz"}}, r"'none.npz' cannot be read as a shard (No such file or directory)"),
        ({"device": "cud"}, r"--device 'cud' is not to be had here ("),
        ({"device": "cuda:99"}, r"--device 'cuda:99' is not to be had here ("),
        ({"allow": ["none.py:Net"]}, r"there is no file 'none.py' (looked in "),
        ({"allow": ["fedavh"]}, r"there is no 'fedavh' in what --allow names"),
    ],
)
def test_a_look_says_what_is_not_to_be_had(place: Place, changes: dict[str, Any], message: str) -> None:
    assert message in place.look(**changes)["error"]


def test_a_look_at_code_that_lacks_the_name(place: Place) -> None:
    assert "has no 'Louder' (did you mean 'Loud'?)" in place.look(allow=[f"{place.mine}:Louder"])["error"]
