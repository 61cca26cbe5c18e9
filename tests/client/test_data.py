from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from shoal.client import data
from shoal.client.data import Shard, Table, as_table, table
from shoal.protos.errors import DataError


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
        (([1, 2], [0.5, 1e300]), "here: the label of row 1 is inf as float32; drop such rows, or scale"),
        (([1, 2], [0, 1], [["a", "b"], ["c", "d"]]), r"here: clients has shape \[2, 2\]; give each row one id"),
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


def test_a_function_must_return_rows() -> None:
    ready = table([1], [2])

    assert as_table(ready, "f") is ready
    with pytest.raises(DataError, match=r"f.py:make returned int; it must return a Table, \(x, y\) or"):
        as_table(3, "f.py:make")


def test_public_names_are_sorted() -> None:
    assert data.__all__ == sorted(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
