import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from shoal.client import data
from shoal.client.data import (
    Shard,
    Table,
    as_table,
    read_csv,
    read_function,
    read_image_folder,
    read_npz,
    read_parquet,
    table,
)
from shoal.protos.errors import DataError, ExperimentError

FRAME = pd.DataFrame(
    {
        "age": [30, 40, 50],
        "tall": [True, False, True],
        "income": [1.5, 2.5, 3.5],
        "job": ["b", "a", "b"],
        "who": ["7", "07", "7"],
    }
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "people.csv"
    FRAME.to_csv(path, index=False)
    return path


def draw(path: Path, colour: Any, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_a_shard_counts_its_training_examples_and_hands_out_its_test_part() -> None:
    shard = Shard(torch.zeros(3, 2), torch.zeros(3), torch.ones(1, 2), torch.ones(1))

    assert len(shard) == 3
    assert shard.held_out is not None
    assert shard.held_out.x.tolist() == [[1.0, 1.0]]
    assert shard.held_out.held_out is None


@pytest.mark.parametrize("parts", [(2, 3, None, None), (2, 2, 1, 2), (2, 2, 1, None)])
def test_a_shard_refuses_unequal_lengths(parts: tuple[int | None, ...]) -> None:
    with pytest.raises(DataError, match="give each example one label"):
        Shard(*(None if n is None else torch.zeros(n) for n in parts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y", "expected", "dtype"),
    [
        ([3, 1], [3, 1], "int64"),
        ([True, False], [1, 0], "int64"),
        ([0.5, 1], [0.5, 1], "float32"),
        (["b", "a"], [1, 0], "int64"),
    ],
)
def test_labels_by_type(y: list[Any], expected: list[Any], dtype: str) -> None:
    made = table([[1, 2], [3, 4]], y)

    assert made.y.tolist() == expected
    assert made.y.dtype == dtype
    assert made.class_names == (("a", "b") if isinstance(y[0], str) else None)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, list, pd.DataFrame])
def test_arrays_of_any_kind_become_float32(convert: Any) -> None:
    made = table(convert([[1, 2], [3, 4]]), [0, 1], [7, "x"])

    assert made.x.dtype == np.float32
    assert made.x.tolist() == [[1, 2], [3, 4]]
    assert made.clients is not None
    assert made.clients.tolist() == ["7", "x"]


def test_torch_in_bfloat16_and_with_gradients() -> None:
    assert table(torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True), [0, 1]).x.tolist() == [[1], [1]]


def test_token_ids_stay_integers() -> None:
    made = table([[5, 6]], [[6, 7]], dtype="int64")

    assert made.x.dtype == made.y.dtype == np.int64
    assert table(pd.DataFrame({"a": [5]}), [1], dtype="int64").x.tolist() == [[5]]
    with pytest.raises(DataError, match="float64 cannot become int64; encode"):
        table([[5.5, 6]], [0], dtype="int64")


def test_class_names_fix_the_numbers_so_that_devices_agree() -> None:
    assert table([1, 2], ["dog", "fox"], class_names=["cat", "dog", "fox"]).y.tolist() == [1, 2]
    assert table([1, 2], [10, 5], class_names=["5", "10"]).y.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"here: label 'dgo' is not in class_names \(did you mean 'dog'\?\)"):
        table([1, 2], ["dgo", "fox"], class_names=["dog", "fox"], where="here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0], [np.nan]], [0, 1]), "here: row 1, column 0 is nan; drop or fill"),
        (([1.0, np.inf], [0, 1]), "here: row 1 is inf; drop or fill"),
        (([[1e300], [1.0]], [0, 1]), "row 0, column 0 is inf.*scale the column"),
        ((pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, np.inf]}), [0, 1]), "row 1, column 'b' is inf"),
        ((pd.DataFrame({"a": [1.0, np.nan]}), [0, 1]), "here: row 1, column 'a' is missing; drop or fill"),
        ((pd.DataFrame({"a": ["x", "y"]}), [0, 1]), "here: column 'a' is .*, not numbers; encode it"),
        (([["x"], ["y"]], [0, 1]), "here: features of dtype <U1 cannot become float32; encode"),
        (([[1], [2, 3]], [0, 1]), "here is ragged.*pad or resize"),
        (([1, 2], [0, None]), "here: row 1 has no label; drop or fill"),
        (([1, 2], [0.0, np.nan]), "here: row 1 has no label; drop or fill"),
        (([1, 2], pd.Series(["a", None], name="job")), "row 1 has no label in column 'job'"),
        (([1, 2], [1j, 2j]), "labels of dtype complex128 are no classes; give integers"),
        (([1, 2], [0, 1], ["a", None]), "here: row 1 has no client id; drop or fill"),
        (([1, 2], [0, 1, 2]), "here: x has 2 rows, y 3 and clients 2; give each row one"),
        (([1, 2], [0, 1], ["a"]), "here: x has 2 rows, y 2 and clients 1; give each row one"),
        (([], []), "here: x has no rows; a table needs at least one"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_remedy(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        table(*arguments, where="here")


def test_a_table_made_by_hand_must_have_the_right_types() -> None:
    good = np.zeros(1, np.float32)

    with pytest.raises(DataError, match=r"x is of dtype float64.*build it with table\(x, y\)"):
        Table(np.zeros(1), good)
    with pytest.raises(DataError, match=r"clients is of dtype int64.*build it with table"):
        Table(good, good, np.zeros(1, np.int64))


def test_take_keeps_rows_together() -> None:
    taken = table([1, 2, 3], ["a", "b", "c"], ["x", "y", "z"]).take(np.array([2, 0]))

    assert taken.x.tolist() == [3, 1]
    assert taken.y.tolist() == [2, 0]
    assert taken.clients is not None
    assert taken.clients.tolist() == ["z", "x"]
    assert taken.class_names == ("a", "b", "c")


def test_npz_scales_images_and_leaves_other_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    pixels = np.full((2, 5, 6), 255, np.uint8)
    np.savez(path, x=pixels, rgb=pixels[..., None].repeat(3, -1), flat=pixels[:, 0], y=[4, 5], who=[1, 2])

    grey = read_npz(path, clients="who")
    assert grey.x.shape == (2, 1, 5, 6)
    assert grey.x.dtype == np.float32
    assert grey.x.max() == 1
    assert grey.clients is not None
    assert grey.clients.tolist() == ["1", "2"]
    assert read_npz(path, x="rgb").x.shape == (2, 3, 5, 6)
    assert read_npz(path, x="flat").x.max() == 255


def test_npz_errors(tmp_path: Path) -> None:
    pickled, broken = tmp_path / "pickled.npz", tmp_path / "broken.npz"
    np.savez(pickled, x=np.array([object()]), y=[1])
    broken.write_bytes(b"no archive")

    with pytest.raises(DataError, match=r"pickled.npz has no array 'labels' \(known: x, y\)"):
        read_npz(pickled, y="labels")
    for path in (pickled, broken):
        with pytest.raises(DataError, match=rf"{path.name} cannot be read .*write it with np.savez"):
            read_npz(path)
    with pytest.raises(DataError, match=r"no such file 'nowhere.npz' \(looked in .*\); correct the path"):
        read_npz("nowhere.npz")


def test_csv_takes_all_other_columns_and_keeps_ids_as_text(csv: Path) -> None:
    read = read_csv(csv, "job", "who")

    assert read.x.tolist() == [[30, 1, 1.5], [40, 0, 2.5], [50, 1, 3.5]]
    assert read.y.tolist() == [1, 0, 1]
    assert read.class_names == ("a", "b")
    assert read.clients is not None
    assert read.clients.tolist() == ["7", "07", "7"]


def test_csv_with_chosen_columns(csv: Path) -> None:
    read = read_csv(csv, "income", features=["age"])

    assert read.x.tolist() == [[30], [40], [50]]
    assert read.y.dtype == np.float32
    assert read.clients is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "jobb"}, r"people.csv has no column 'jobb' \(did you mean 'job'\?\)"),
        ({"label": "job", "client": "hwo"}, r"people.csv has no column 'hwo' \(did you mean 'who'\?\)"),
        ({"label": "job", "features": ["ages"]}, r"people.csv has no column 'ages' \(did you mean 'age'\?\)"),
        ({"label": "income"}, "people.csv: column 'job' is .*, not numbers; encode it, or leave it out of features"),
        ({"label": "job", "features": []}, "people.csv has no feature columns beside 'job'; name them in features"),
    ],
)
def test_csv_errors(csv: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_csv(csv, **arguments)


def test_csv_gaps_and_empty_files(tmp_path: Path) -> None:
    gap, empty = tmp_path / "gap.csv", tmp_path / "empty.csv"
    gap.write_text("a,b,y,c\n1,1,0,u\n,2,1,\n3,3,,w\n")
    empty.write_text("")

    for arguments, message in (
        ({"label": "b", "features": ["a"]}, "row 1, column 'a' is missing"),
        ({"label": "y", "features": ["b"]}, "row 2 has no label in column 'y'"),
        ({"label": "b", "client": "c", "features": ["b"]}, "row 1 has no client id in column 'c'"),
    ):
        with pytest.raises(DataError, match=rf"gap.csv: {message}; drop or fill such rows"):
            read_csv(gap, **arguments)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"empty.csv is no CSV file with a header"):
        read_csv(empty, "y")


def test_parquet_reads_like_csv(tmp_path: Path, csv: Path) -> None:
    path = tmp_path / "people.parquet"
    FRAME.assign(age=FRAME["age"].astype("Int64"), job=FRAME["job"].astype("category")).to_parquet(path)

    ours, theirs = read_parquet(path, "job", "who"), read_csv(csv, "job", "who")
    assert ours.x.tolist() == theirs.x.tolist()
    assert ours.y.tolist() == theirs.y.tolist()
    assert ours.class_names == theirs.class_names
    with pytest.raises(DataError, match=r"people.csv is no Parquet file"):
        read_parquet(csv, "job")


@pytest.mark.parametrize(
    ("module", "read", "message"),
    [
        (
            "pyarrow",
            lambda path: read_parquet(path, "job"),
            r"reading Parquet needs pyarrow: pip install 'shoal\[parquet\]'",
        ),
        (
            "PIL.Image",
            lambda path: read_image_folder(path.parent),
            r"reading images needs Pillow: pip install 'shoal\[images\]'",
        ),
    ],
)
def test_a_missing_extra_is_named(
    csv: Path, monkeypatch: pytest.MonkeyPatch, module: str, read: Any, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(DataError, match=message):
        read(csv)


def test_image_folder(tmp_path: Path) -> None:
    draw(tmp_path / "dog/1.png", (255, 0, 0))
    draw(tmp_path / "cat/1.PNG", (0, 255, 0))
    (tmp_path / "cat/notes.txt").write_text("no image")

    read = read_image_folder(tmp_path)
    assert read.x.shape == (2, 3, 3, 4)
    assert read.x[:, :, 0, 0].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert read.y.tolist() == [0, 1]
    assert read.class_names == ("cat", "dog")
    assert read_image_folder(tmp_path, size=8, grayscale=True).x.shape == (2, 1, 8, 8)
    assert read_image_folder(tmp_path, class_names=["dog", "cat"]).y.tolist() == [1, 0]


def test_image_folder_by_client(tmp_path: Path) -> None:
    for place in ("ann/cat", "ann/dog", "bob/dog"):
        draw(tmp_path / place / "1.png", (0, 0, 0))

    read = read_image_folder(tmp_path, clients=True)
    assert read.clients is not None
    assert read.clients.tolist() == ["ann", "ann", "bob"]
    assert read.y.tolist() == [0, 1, 1]


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*; the layout is class/image.png, or .* with clients=true"):
        read_image_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder 'nowhere'"):
        read_image_folder("nowhere")
    draw(tmp_path / "a/1.png", (0, 0, 0))
    draw(tmp_path / "a/2.png", (0, 0, 0), size=(5, 5))
    with pytest.raises(DataError, match=r"2.png is \(5, 5\), but the first image is \(3, 4\); set size"):
        read_image_folder(tmp_path)
    draw(tmp_path / "a/2.png", 70000, mode="I;16")
    with pytest.raises(DataError, match=r"2.png has more than 8 bits .*convert it"):
        read_image_folder(tmp_path)
    (tmp_path / "a/2.png").write_text("broken")
    with pytest.raises(DataError, match=r"2.png cannot be read as an image .*replace or remove it"):
        read_image_folder(tmp_path)


def test_functions_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def make(n: int, ids=False):\n    return ([1] * n, [0] * n, ['a'] * n) if ids else ([1] * n, [0] * n)\n"
    )

    assert len(read_function(f"{path}:make", n=3)) == 3
    clients = read_function(f"{path}:make", n=2, ids=True).clients
    assert clients is not None
    assert clients.tolist() == ["a", "a"]
    with pytest.raises(ExperimentError, match=r"'data.n' is missing"):
        read_function(f"{path}:make")


def test_a_function_must_return_rows() -> None:
    ready = table([1], [2])

    assert as_table(ready, "f") is ready
    with pytest.raises(DataError, match=r"f.py:make returned int; it must return a Table, \(x, y\) or"):
        as_table(3, "f.py:make")


def test_public_names_are_sorted() -> None:
    assert data.__all__ == sorted(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
