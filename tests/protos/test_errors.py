"""The exception tree and its one helper."""

from __future__ import annotations

import inspect

import pytest

from shoal.protos import errors
from shoal.protos.errors import ShoalError, nearest


def test_every_error_is_in_the_tree_and_in_its_drawing() -> None:
    found = {name for name, each in vars(errors).items() if inspect.isclass(each) and issubclass(each, ShoalError)}

    assert found | {"nearest"} == set(errors.__all__)
    assert all(name in (errors.__doc__ or "") for name in found)


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("rouds", ["seed", "rounds"], " (did you mean 'rounds'?)"),
        ("zzz", iter(["b", "a"]), " (known: a, b)"),
        ("zzz", [], ""),
    ],
)
def test_nearest(word: str, known: list[str], expected: str) -> None:
    assert nearest(word, known) == expected
