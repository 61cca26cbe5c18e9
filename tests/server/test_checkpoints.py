"""Checkpoints: exact, atomic, and never silently wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.protos.errors import RunError
from shoal.protos.parameters import Entry, Layout, Segment
from shoal.server.checkpoints import Checkpoint, latest, write
from shoal.strategies.base import vector
from shoal.strategies.sums import Carried

LAYOUT = Layout(
    (
        Entry("w", Segment.TRAINABLE, "float32", (3,)),
        Entry("f", Segment.FROZEN, "bfloat16", (1,)),
        Entry("n", Segment.COUNTERS, "int64", ()),
    )
)


def checkpoint(round: int = 3) -> Checkpoint:
    return Checkpoint(
        round=round,
        state={"parameters": torch.tensor([1.0, -0.0, 1e-42]), "control": torch.randn(3), "step": 0.1 + 0.2},
        carried=Carried(torch.zeros(0), torch.tensor([2**40])),
        layout=LAYOUT,
        frozen={"f": torch.tensor([2.5])},
        selector={"seen": ["a"]},
        clients={"a/b.c 'd'": 3, "ü": 0},
    )


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    kept = checkpoint()
    write(tmp_path, kept)
    read = latest(tmp_path)

    assert read is not None
    assert (read.round, read.layout, read.selector, read.state["step"]) == (3, LAYOUT, {"seen": ["a"]}, 0.1 + 0.2)
    assert all(same(vector(read.state, name), vector(kept.state, name)) for name in ("parameters", "control"))
    assert same(read.carried.counters, kept.carried.counters) and same(read.carried.buffers, kept.carried.buffers)
    assert read.clients == {"a/b.c 'd'": 3, "ü": 0}
    assert same(read.frozen["f"], kept.frozen["f"])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for round in (1, 2, 10):
        write(tmp_path, checkpoint(round))

    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round-00002", "round-00010"]


def test_all_names_are_on_the_disk_before_the_checkpoint_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = tmp_path / "checkpoints", dict[str, set[str]]()

    def sync(path: Path) -> None:
        synced[str(path.relative_to(tmp_path))] = {inside.name for inside in path.iterdir()}

    monkeypatch.setattr("shoal.server.checkpoints.sync_folder", sync)
    write(folder, checkpoint())

    assert list(synced.items()) == [
        ("checkpoints/.round-00003", {"tensors.safetensors", "state.json"}),
        (".", {"checkpoints"}),
        ("checkpoints", {"round-00003"}),
    ]


def test_writing_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, checkpoint())
    write(tmp_path, checkpoint())

    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "no json", "other json"])
@pytest.mark.fault(21)
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, checkpoint(1))
    write(tmp_path, checkpoint(2))
    tensors, numbers = tmp_path / "round-00002" / "tensors.safetensors", tmp_path / "round-00002" / "state.json"
    data = tensors.read_bytes()
    if damage == "cut":
        tensors.write_bytes(data[:-4])
    elif damage == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "gone":
        tensors.unlink()
    elif damage == "no json":
        numbers.write_text("{")
    else:  # one bit: another client, and it is still JSON
        whole = numbers.read_text()
        assert "a/b.c 'd'" in whole
        numbers.write_text(whole.replace("a/b.c 'd'", "A/b.c 'd'"))
    read = latest(tmp_path)

    assert read is not None and read.round == 1


@pytest.mark.fault(21)
def test_only_damaged_ones_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, checkpoint(1))
    (tmp_path / "round-00001" / "state.json").write_text("{}")
    with pytest.raises(RunError, match="round-00001"):
        latest(tmp_path)


@pytest.mark.parametrize("numbers", ["{}", "[]", '{"format": 0}'])
@pytest.mark.fault(22)
def test_one_of_another_version_is_refused(tmp_path: Path, numbers: str) -> None:
    write(tmp_path, checkpoint(1))
    (tmp_path / "round-00001" / "state.json").write_text(numbers)
    with pytest.raises(RunError, match="round-00001: it was written by another version of Shoal"):
        latest(tmp_path)


def test_none_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None


@pytest.mark.fault(3, 21)
def test_an_unfinished_one_is_invisible(tmp_path: Path) -> None:
    write(tmp_path, checkpoint(1))
    (tmp_path / ".round-00002").mkdir()

    read = latest(tmp_path)
    assert read is not None and read.round == 1


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    for round in (99_990, 100_000, 100_010):
        write(tmp_path, checkpoint(round))
    read = latest(tmp_path)

    assert read is not None and read.round == 100_010
