"""Where a client's examples come from: exactly what was split, a file of its own, or its rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.client.data import Shard
from shoal.client.sources import read_shard, shard_of, write_shard
from shoal.protos.errors import DataError, ExperimentError

RNG = np.random.default_rng(0)
FEATURES = torch.from_numpy(RNG.normal(size=(6, 3)).astype("float32"))
IMAGES = torch.from_numpy(RNG.integers(0, 256, (6, 1, 4, 5)).astype("float32") / 255)
TOKENS = torch.from_numpy(RNG.integers(0, 70_000, (6, 7)))
CLASSES, AMOUNTS = torch.tensor([0, 1, 2, 0, 1, 2]), torch.from_numpy(RNG.normal(size=6).astype("float32"))
TABLE = "age,site,outcome\n30,north,0\n40,south,1\n50,north,1\n60,north,0\n"


@pytest.fixture
def csv(tmp_path: Path) -> str:
    (tmp_path / "visits.csv").write_text(TABLE)
    return str(tmp_path / "visits.csv")


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """In dtype, shape and bits."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# --- shard files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("y", [CLASSES, AMOUNTS, TOKENS], ids=["classes", "amounts", "next tokens"])
@pytest.mark.parametrize("x", [FEATURES, IMAGES, TOKENS], ids=["features", "images", "tokens"])
def test_a_shard_comes_back_to_the_bit(tmp_path: Path, x: torch.Tensor, y: torch.Tensor, held_out: bool) -> None:
    written = Shard(x[:4], y[:4], x[4:], y[4:]) if held_out else Shard(x, y)
    read = read_shard(write_shard(tmp_path, "a", written))

    for name in ("x", "y", "x_test", "y_test"):
        assert same(getattr(read, name), getattr(written, name)), name


def test_values_at_the_edge_of_their_type_come_back(tmp_path: Path) -> None:
    edges = torch.tensor([[-0.0, 1e-45, 3.4e38, -1.1754944e-38]])
    ids = torch.tensor([2**62, -(2**63)])
    read = read_shard(write_shard(tmp_path, "a", Shard(edges, ids[:1], edges, ids[1:])))

    assert same(read.x, edges)
    assert (read.y.item(), read.y_test.item() if read.y_test is not None else None) == (2**62, -(2**63))


@pytest.mark.parametrize("client", ["a b", "a/b", "..", "100%", "läufer", ".hidden", "x" * 80])
def test_any_name_is_a_file_in_the_folder(tmp_path: Path, client: str) -> None:
    path = write_shard(tmp_path, client, Shard(FEATURES, CLASSES))

    assert path.resolve().parent == tmp_path.resolve()
    assert len(read_shard(path)) == 6
    assert list(tmp_path.iterdir()) == [path]


def test_a_shard_is_replaced_whole(tmp_path: Path) -> None:
    old = write_shard(tmp_path, "a", Shard(FEATURES, CLASSES))
    with old.open("rb") as reader:
        write_shard(tmp_path, "a", Shard(IMAGES, CLASSES))
        with np.load(reader) as archive:
            assert archive["x"].shape == (6, 3)

    assert same(read_shard(old).x, IMAGES)


@pytest.mark.parametrize(
    ("x", "dtype", "shape"),
    [
        (np.full((2, 5, 6), 255, "uint8"), torch.float32, (2, 1, 5, 6)),
        (np.full((2, 5), 255, "uint8"), torch.float32, (2, 5)),
        (np.ones((2, 3), "float64"), torch.float32, (2, 3)),
        (np.ones((2, 3), "float16"), torch.float32, (2, 3)),
        (np.ones((2, 3), "bool"), torch.float32, (2, 3)),
        (np.ones((2, 3), "int32"), torch.int64, (2, 3)),
        (np.ones((2, 3), "uint16"), torch.int64, (2, 3)),
        (np.asfortranarray(np.ones((2, 3))), torch.float32, (2, 3)),
        (np.ones((2, 3), ">f4"), torch.float32, (2, 3)),
    ],
)
def test_a_file_that_somebody_else_wrote(tmp_path: Path, x: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "theirs.npz", x=x, y=[1, 0], notes=np.array("of March"))
    read = read_shard(tmp_path / "theirs.npz")

    assert (read.x.dtype, tuple(read.x.shape), read.x_test) == (dtype, shape, None)
    assert read.y.tolist() == [1, 0]
    read.x.add_(0)  # memory of its own, that may be written


def test_held_out_text_labels_are_numbered_as_the_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), y=["no", "yes", "maybe"], x_test=np.ones((1, 2)), y_test=["yes"])
    read = read_shard(tmp_path / "a.npz")

    assert read.y.tolist() == [1, 2, 0]
    assert read.y_test is not None
    assert read.y_test.tolist() == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read as a shard \(No such file or directory\)"),
        (b"", r"cannot be read as a shard \(File is not a zip file\); make one with 'shoal data split'"),
        (b"name,age\nx,3\n", r"cannot be read as a shard \(File is not a zip file\)"),
    ],
)
def test_a_file_that_is_no_shard(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)

    with pytest.raises(DataError, match=message):
        read_shard(tmp_path / "a.npz")


def test_a_file_that_was_cut_off_or_damaged(tmp_path: Path) -> None:
    whole = write_shard(tmp_path, "a", Shard(FEATURES, CLASSES)).read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 1
    for content in (whole[: len(whole) // 2], whole[:-10], bytes(flipped)):
        (tmp_path / "a.npz").write_bytes(content)

        with pytest.raises(DataError, match=r"a.npz'? cannot be read"):
            read_shard(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((2, 3))}, r"has no array 'y'"),
        ({"features": np.ones((2, 3)), "y": [0, 1]}, r"has no array 'x'"),
        ({"x": np.ones((2, 3)), "y": [0, 1, 1]}, r"x has 2 rows, y 3"),
        ({"x": np.array([["a"], ["b"]]), "y": [0, 1]}, r"features of dtype <U1 cannot become float32; encode them"),
        ({"x": np.array([[1.0], [np.nan]]), "y": [0, 1]}, r"row 1, column 0 is nan; drop or fill"),
        ({"x": np.ones((0, 3)), "y": np.ones(0)}, r"x has no rows"),
        ({"x": np.array([object()]), "y": [0]}, r"cannot be read as a shard \(Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_are_no_examples(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)

    with pytest.raises(DataError, match=message) as caught:
        read_shard(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_of_a_table_that_names_its_clients_one_takes_its_rows(csv: str) -> None:
    spec = {"name": "csv", "path": csv, "label": "outcome", "client": "site"}

    assert shard_of("north", spec).x.tolist() == [[30], [50], [60]]
    assert shard_of("south", spec).y.tolist() == [1]


def test_a_table_without_clients_is_all_ones_own(csv: str) -> None:
    read = shard_of("anybody", {"name": "csv", "path": csv, "label": "outcome", "features": ["age"]})

    assert (len(read), read.held_out) == (4, None)


def test_a_share_is_held_out_and_always_the_same(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(20.0)[:, None], y=np.zeros(20, int))
    spec = {"name": "npz", "path": str(tmp_path / "a.npz"), "client_test": 0.25}
    one, again, other = (shard_of(client, spec) for client in ("a", "a", "b"))

    assert one.x_test is not None and other.x_test is not None
    assert (len(one.x), len(one.x_test)) == (15, 5)
    assert sorted([*one.x.ravel().tolist(), *one.x_test.ravel().tolist()]) == list(range(20))
    assert same(one.x_test, again.x_test)
    assert not same(one.x_test, other.x_test)


def test_a_client_with_one_example_trains_on_it(csv: str) -> None:
    read = shard_of("south", {"name": "csv", "path": csv, "label": "outcome", "client": "site", "client_test": 0.9})

    assert (len(read), read.held_out) == (1, None)


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan"), "half", True])
def test_a_share_that_is_none(csv: str, share: object) -> None:
    with pytest.raises(DataError, match=r"client_test is .*; it must be a fraction, from 0 to below 1"):
        shard_of("a", {"name": "csv", "path": csv, "label": "outcome", "features": ["age"], "client_test": share})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"client": "site"}, r"no row belongs to client 'east' \(the data names 'north', 'south'\); set --id"),
        ({}, r"column 'site' is .*, not numbers; encode it, or leave it out of features"),
        ({"label": "outcom"}, r"has no column 'outcom' \(did you mean 'outcome'\?\)"),
        ({"path": "nowhere.csv"}, r"no such file 'nowhere.csv' \(looked in "),
    ],
)
def test_a_table_that_does_not_fit(csv: str, spec: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        shard_of("east", {"name": "csv", "path": csv, "label": "outcome"} | spec)


def test_a_readers_argument_that_is_misspelled(csv: str) -> None:
    with pytest.raises(ExperimentError, match=r"unknown key 'data.lable' for 'csv' \(did you mean 'label'\?\)"):
        shard_of("a", {"name": "csv", "path": csv, "lable": "outcome"})


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def read(n: int):\n    return [[1.0]] * n, [0] * n, ['a', 'b'] * (n // 2)\n")

    assert len(shard_of("b", {"name": f"{path}:read", "n": 6})) == 3
