"""What a server may ask a client to run, and what of a server's folders a client may learn."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protos.assignment import Assignment, permitted, portable
from shoal.protos.errors import CodecError, NotAllowed
from shoal.protos.experiment import Component

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def an_assignment(**changes: Any) -> Assignment:
    fields: dict[str, Any] = {
        "strategy": Component(name="fedprox", mu=0.1),  # type: ignore[call-arg]
        "local": {"lr": 0.1, "loss": "mse", "metrics": ["mae"], "betas": [0.9, 0.99]},
        "model": Component(name="mlp"),
        "seed": 3,
        "dtype": "float32",
    }
    return Assignment(**(fields | changes))


@pytest.mark.parametrize("client", [None, Component(name="clients.py:Mine")])
def test_an_assignment_comes_back_as_it_was(client: Component | None) -> None:
    assignment = an_assignment(client=client)

    assert Assignment.decode(assignment.encode()) == assignment


def test_the_same_assignment_gives_the_same_bytes() -> None:
    turned = an_assignment(local={"betas": [0.9, 0.99], "metrics": ["mae"], "loss": "mse", "lr": 0.1})

    assert turned.encode() == an_assignment().encode()


good = json.loads(an_assignment().encode())
WRONG: list[dict[str, Any]] = [
    {"seed": "3"},
    {"seed": True},
    {"dtype": None},
    {"model": None},
    {"model": {"name": 3}},
    {"model": {}},
    {"local": []},
    {"code": "import os"},
]


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff\xfe", b"{", b"[]", b"null", b"7", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"),
        *(json.dumps(good | change).encode() for change in WRONG),
    ],
)
def test_what_is_no_assignment_is_a_codec_error(data: bytes) -> None:
    with pytest.raises(CodecError, match="the server's assignment cannot be read"):
        Assignment.decode(data)


@quick
@given(st.integers(0, 200), st.binary(max_size=4))
def test_damaged_json_is_an_assignment_or_a_codec_error(at: int, noise: bytes) -> None:
    data = an_assignment().encode()
    with contextlib.suppress(CodecError):
        Assignment.decode(data[:at] + noise + data[at + len(noise) :])


def test_installed_names_need_no_permission() -> None:
    assert an_assignment(client=Component(name="own")).permitted([]) == an_assignment(client=Component(name="own"))


@pytest.mark.parametrize(
    "change",
    [
        {"strategy": Component(name="evil.py:Strategy")},
        {"model": Component(name="os:system")},
        {"client": Component(name="/tmp/evil.py:Client")},
        {"local": {"loss": "evil:loss"}},
        {"local": {"metrics": ["accuracy", "evil.py:metric"]}},
    ],
)
def test_code_beside_the_installation_must_be_allowed(change: dict[str, Any]) -> None:
    with pytest.raises(NotAllowed, match="did not allow; who trusts that code"):
        an_assignment(**change).permitted(["good.py:Strategy", "evil2.py:Client"])


def test_what_comes_out_is_the_owners_own_path() -> None:
    allow = ["/home/me/code/mine.py:Model", "~/other.py:loss", "lib.losses:mine"]
    asked = an_assignment(
        model=Component(name="/srv/evil/mine.py:Model", size=3),  # type: ignore[call-arg]
        local={"loss": "../other.py:loss", "metrics": ["lib.losses:mine", "mae"]},
    )
    found = asked.permitted(allow)

    assert (found.model.name, found.model.arguments) == (allow[0], {"size": 3})
    assert found.local == {"loss": allow[1], "metrics": [allow[2], "mae"]}


@pytest.mark.parametrize(
    "name",
    ["mine.py:Other", "mine:Model", "xmine.py:Model", "mine.py:Model:x", "mine.py:", ":Model", ":", "mine.py:model"],
)
def test_a_name_that_is_only_alike_is_not_allowed(name: str) -> None:
    with pytest.raises(NotAllowed):
        permitted(name, ["/home/me/mine.py:Model"])


def test_no_folder_of_this_machine_leaves_it() -> None:
    described = {
        "model": {"name": "/home/me/secret/nets.py:Net", "sizes": (1, 2)},
        "local": {"loss": "C:/Users/me/losses.py:loss", "metrics": ["/home/me/m.py:a", "lib:b", "mae"], "lr": 0.1},
        "seed": 3,
    }

    assert portable(described) == {
        "model": {"name": "nets.py:Net", "sizes": [1, 2]},
        "local": {"loss": "losses.py:loss", "metrics": ["m.py:a", "lib:b", "mae"], "lr": 0.1},
        "seed": 3,
    }
