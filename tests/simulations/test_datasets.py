import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from shoal.client.data import Table, table
from shoal.protos.errors import DataError, ExperimentError
from shoal.simulations import datasets
from shoal.simulations.datasets import (
    Dataset,
    from_arrays,
    from_csv,
    from_folder,
    from_npz,
    from_parquet,
    from_shards,
    load,
)
from shoal.simulations.federated import FederatedData
from shoal.simulations.label_skew import Dirichlet
from shoal.simulations.partitioners import Iid, Natural, Partitioner

X = np.arange(60, dtype=np.float32).reshape(30, 2)
Y = np.arange(30) % 3
IDS = np.array(["b", "a", "c"])[np.arange(30) % 3]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    pd.DataFrame({"u": X[:, 0], "v": X[:, 1], "y": Y, "who": IDS}).to_csv(path, index=False)
    return path


def rows_of(data: FederatedData) -> dict[str, tuple[list[float], list[float]]]:
    """The first feature of each client's rows, to train and to test on."""
    shards = {client: data.shard(client) for client in data.clients}
    return {
        client: (shard.x[:, 0].tolist(), [] if shard.x_test is None else shard.x_test[:, 0].tolist())
        for client, shard in shards.items()
    }


def test_split_takes_the_clients_column_or_the_partitioner() -> None:
    own, iid = from_arrays(X, Y, IDS), from_arrays(X, Y, IDS, partition=Iid(4))

    assert own.split(0).clients == ("a", "b", "c")
    assert rows_of(own.split(0))["a"] == (X[1::3, 0].tolist(), [])
    assert iid.split(0).clients == ("0", "1", "2", "3")
    assert sorted(row for train, _ in rows_of(iid.split(0)).values() for row in train) == X[:, 0].tolist()
    assert rows_of(iid.split(0)) == rows_of(iid.split(0)) != rows_of(iid.split(1))
    with pytest.raises(DataError, match="does not name its clients: give the column"):
        from_arrays(X, Y).split(0)


def test_labels_stay_with_their_rows() -> None:
    data = from_arrays(X, Y, partition={"kind": "dirichlet", "clients": 3, "alpha": 1.0}, client_test=0.3).split(5)

    for client in data.clients:
        shard = data.shard(client)
        assert ((shard.x[:, 0] / 2) % 3).tolist() == shard.y.tolist()


def test_clients_hold_out_a_part_of_the_same_shard() -> None:
    whole, held = from_arrays(X, Y, IDS).split(0), from_arrays(X, Y, IDS, client_test=0.2).split(0)

    for client, (train, test) in rows_of(held).items():
        assert len(test) == 2
        assert sorted(train + test) == rows_of(whole)[client][0]
        assert (train, test) == (sorted(train), sorted(test))


def test_a_client_with_one_row_trains_on_it_and_one_with_two_tests_on_one() -> None:
    data = from_shards({"one": ([[1.0]], [0]), "two": ([[1.0], [2.0]], [0, 1])}, client_test=0.01).split(0)

    assert data.shard("one").held_out is None
    assert len(data.shard("one")) == len(data.shard("two")) == 1


@pytest.mark.parametrize("value", [-0.1, 1.0, "0.2", True, float("nan")])
def test_fractions(value: Any, csv: Path) -> None:
    with pytest.raises(ExperimentError, match=r"'data.client_test' is .*; it must be a fraction, from 0 to below 1"):
        from_arrays(X, Y, IDS, client_test=value)
    with pytest.raises(ExperimentError, match=r"'data.test_fraction' is .*; it must be a fraction"):
        load("csv", path=csv, label="y", features=["u"], test_fraction=value)


def test_the_number_of_classes() -> None:
    assert from_arrays(X, Y).classes == 3
    assert from_arrays(X, Y, test=(X[:1], [7])).classes == 8
    assert from_arrays(X, Y / 2).classes is None
    assert from_arrays(X[:2], ["b", "a"], class_names=["a", "b", "c"]).classes == 3
    assert from_arrays(X, Y, IDS).split(0).classes == 3


def test_text_labels_mean_the_same_in_the_test_set() -> None:
    data = from_arrays(X[:2], ["cat", "dog"], ["u", "v"], test=(X[:1], ["dog"])).split(0)

    assert data.test is not None
    assert data.test.y.tolist() == [1]
    with pytest.raises(DataError, match=r"test: label 'fox' is not in class_names"):
        from_arrays(X[:2], ["cat", "dog"], test=(X[:1], ["fox"]))
    with pytest.raises(DataError, match=r"test labels are named .*; read both with the same class_names"):
        from_arrays(X[:2], ["cat", "dog"], test=table(X[:1], ["dog"]))


def test_the_test_set_must_look_alike() -> None:
    with pytest.raises(DataError, match=r"test examples have shape \[3\], but those to train on \[2\]; prepare both"):
        from_arrays(X, Y, test=(np.zeros((1, 3)), [0]))


def test_a_partitioner_is_checked_when_the_data_set_is_made() -> None:
    with pytest.raises(ExperimentError, match=r"'data.partition.alpha' is -1"):
        from_arrays(X, Y, partition=Dirichlet(3, alpha=-1.0))


def test_from_shards() -> None:
    data = from_shards({"x": (X[:1], ["dog"]), "y": (torch.zeros(2, 2), ["cat", "dog"])}, test=(X[:1], ["dog"])).split(
        0
    )

    assert data.clients == ("x", "y")
    assert data.shard("x").y.tolist() == [1]
    assert data.shard("y").y.tolist() == [0, 1]
    assert data.test is not None
    assert data.test.y.tolist() == [1]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({}, "there are no shards; give at least one client"),
        ({"a": ([], [])}, "client 'a': x has no rows"),
        (
            {"a": ([[1]], [0]), "b": ([[1, 2]], [0])},
            r"client 'b' has x float32\[2\] .*, the first client x float32\[1\]",
        ),
        (
            {"a": ([[1]], [0]), "b": ([[1]], [0.5])},
            r"client 'b' has .* y float32\[\], .* y int64\[\]; prepare all alike",
        ),
        ({"a": ([[1]], [0]), "b": ([[np.nan]], [0])}, "client 'b': row 0, column 0 is nan"),
    ],
)
def test_from_shards_errors(shards: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_shards(shards)


def test_csv_and_parquet(csv: Path, tmp_path: Path) -> None:
    parquet = tmp_path / "rows.parquet"
    pd.read_csv(csv).to_parquet(parquet)

    ours, theirs = (
        from_csv(csv, "y", "who", client_test=0.2),
        from_parquet(parquet, "y", "who", ["u", "v"], client_test=0.2),
    )
    assert rows_of(ours.split(3)) == rows_of(theirs.split(3))
    assert ours.spec == {"name": "csv", "path": csv, "label": "y", "client": "who", "client_test": 0.2}


def test_npz_brings_its_test_set(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=X, y=IDS, x_test=X[:1], y_test=["c"], who=IDS)

    data = from_npz(path, clients="who").split(0)
    assert data.test is not None
    assert data.test.y.tolist() == [2]
    with pytest.raises(
        ExperimentError, match=r"'npz' would have two test sets; drop data.test_fraction or data.test_path"
    ):
        from_npz(path, test_fraction=0.5)
    np.savez(path, x=X, y=Y)
    assert from_npz(path).test is None


def test_image_folder(tmp_path: Path) -> None:
    for client, label in (("ann", "cat"), ("bob", "dog"), ("bob", "cat")):
        (tmp_path / client / label).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / client / label / "1.png")

    data = from_folder(tmp_path, size=4, clients=True).split(0)
    assert (data.clients, data.shape, data.classes) == (("ann", "bob"), (3, 4, 4), 2)


def test_a_test_file_is_read_with_the_classes_of_the_other(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("v,y\n1,cat\n2,dog\n")
    test.write_text("v,y\n3,dog\n")

    data = load("csv", path=train, test_path=test, label="y")
    assert data.test is not None
    assert data.test.y.tolist() == [1]
    assert data.spec == {"name": "csv", "path": train, "label": "y", "test_path": test}


def test_a_share_of_the_rows_to_test_on_is_the_same_under_every_seed(csv: Path) -> None:
    data = load("csv", path=csv, label="y", client="who", test_fraction=0.2)

    assert (len(data.train), len(data.test or ())) == (24, 6)
    assert data.spec is not None
    assert data.spec["test_fraction"] == 0.2
    tests = [test.x.tolist() for test in (data.split(0).test, data.split(1).test) if test is not None]
    assert tests[0] == tests[1]
    with pytest.raises(
        DataError, match=r"'data.test_fraction' = 0.001 of 30 rows is 0; it must leave rows on both sides"
    ):
        load("csv", path=csv, label="y", client="who", test_fraction=0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fashion-mnist-subse"}, r"'fashion-mnist-subse' .*did you mean 'fashion-mnist-subset'"),
        ({"name": "csv", "partiton": {}}, r"unknown key 'data.partiton' for 'csv' \(did you mean 'partition'\?\)"),
        ({"name": "csv", "lable": "y"}, r"unknown key 'data.lable' for 'csv' \(did you mean 'label'\?\)"),
        ({"name": "csv", "path": "a.csv"}, r"'data.label' is missing"),
        ({"name": "npz", "path": 3}, r"'data.path' is 3"),
        (
            {"partition": {"clients": 3}},
            r"'data.partition' is .*, without a kind; write .* one of continuous, ",
        ),
        ({"partition": "iid"}, r"'data.partition' is 'iid', without a kind"),
        ({"partition": {"kind": "idd", "clients": 3}}, r"'idd' .*did you mean 'iid'"),
        ({"partition": {"kind": "iid", "client": 3}}, r"'data.partition.client' .*did you mean 'clients'"),
        ({"partition": {"kind": "iid", "clients": 0}}, r"'data.partition.clients' is 0"),
        (
            {"partition": {"kind": "fractions:Fraction", "numerator": 4}},
            r"'data.partition.kind' is 'fractions:Fraction', which is no Partitioner",
        ),
    ],
)
def test_load_errors(csv: Path, arguments: dict[str, Any], message: str) -> None:
    full = arguments if "name" in arguments else {"name": "csv", "path": csv, "label": "y", "client": "who"} | arguments

    with pytest.raises(ExperimentError, match=message):
        load(**full)


def test_the_spec_gives_the_data_set_again(csv: Path) -> None:
    text = f"""
        name = "csv"
        path = "{csv}"
        label = "y"
        features = ["u", "v"]
        client_test = 0.1
        partition = {{ kind = "dirichlet-mix", clients = 3, alpha = 1.0 }}
    """
    first = load(**tomllib.loads(text))

    assert first.spec is not None
    assert first.spec["partition"] == {"kind": "dirichlet-mix", "clients": 3, "alpha": 1.0}
    assert rows_of(load(**first.spec).split(2)) == rows_of(first.split(2))


def test_the_spec_is_none_for_what_only_python_can_say(csv: Path) -> None:
    class Mine(Partitioner):
        def split(
            self, labels: np.ndarray, clients: np.ndarray | None, rng: np.random.Generator
        ) -> dict[str, np.ndarray]:
            return {"all": np.arange(len(labels))}

    mine = load("csv", path=csv, label="y", client="who", partition=Mine())
    assert mine.spec is None
    assert mine.split(0).clients == ("all",)
    assert from_arrays(X, Y).spec is None


@pytest.mark.parametrize(
    ("body", "clients"),
    [
        ("x, y, ['u', 'v']", None),
        ("Table(x, y, np.array(['u', 'v'])), Table(x, y)", True),
        ("Table(x, y, np.array(['u', 'v'])), None", False),
        ("table(x, y, ['u', 'v'])", False),
    ],
)
def test_functions_of_the_users_own(tmp_path: Path, body: str, clients: bool | None) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\nfrom shoal.client.data import Table, table\n"
        f"def make():\n    x, y = np.zeros((2, 3), np.float32), np.arange(2)\n    return {body}\n"
    )

    data = load(f"{path}:make")
    assert data.split(0).clients == ("u", "v")
    assert (data.test is not None) == bool(clients)
    remedy = "would have two test sets; drop" if clients else "reads no path; drop it, or set data.test_fraction"
    with pytest.raises(ExperimentError, match=remedy):
        load(f"{path}:make", test_path="a.csv")


def test_a_function_must_return_rows(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def make(**anything):\n    return 3\n")

    with pytest.raises(DataError, match=r"mine.py:make returned int; it must return a Table, \(x, y\) or"):
        load(f"{path}:make", anything=1)


def test_the_usual_partitioner_is_the_datas_own() -> None:
    assert rows_of(Dataset(table(X, Y, IDS)).split(0)) == rows_of(
        Dataset(table(X, Y, IDS), partitioner=Natural()).split(0)
    )


def test_tables_that_cannot_be_written_to_still_split() -> None:
    x = X.copy()
    x.flags.writeable = False
    data = Dataset(Table(x, Y), Table(x, Y), Iid(2)).split(0)

    assert data.test is not None
    assert data.test.x.tolist() == X.tolist()


def test_public_names_are_sorted() -> None:
    assert datasets.__all__ == sorted(datasets.__all__)
    assert all(hasattr(datasets, name) for name in datasets.__all__)
