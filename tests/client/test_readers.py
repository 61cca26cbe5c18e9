import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from shoal.client import readers
from shoal.client.readers import read_csv, read_function, read_image_folder, read_npz, read_parquet
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


def test_public_names_are_sorted() -> None:
    assert readers.__all__ == sorted(readers.__all__)
    assert all(hasattr(readers, name) for name in readers.__all__)
