"""The door of a served app: who comes in, who is told what to do instead, who is which node."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.flower.app import FlowerApp
from shoal.flower.places import Places, said_of
from shoal.protos import fleet_pb2 as wire
from shoal.protos.messages import Setting
from shoal.protos.settings import write_settings
from shoal.server.orders import Denied
from tests.flower.conftest import APPS

APP = FlowerApp.read(APPS / "averaging")


class Door:
    """Two places, and who has come in."""

    def __init__(self, wanted: int = 2) -> None:
        self.places, self.present = Places(APP, wanted), list[str]()

    def come(self, client: str, app: FlowerApp = APP, **own: Any) -> None:
        said = said_of(app, {name.replace("_", "-"): value for name, value in own.items()})
        self.places.admit(wire.Hello(client=client, about=write_settings(said)), self.present)
        self.present += [client] * (client not in self.present)

    def refused(self, client: str, **own: Any) -> str:
        with pytest.raises(Denied) as caught:
            self.come(client, **own)
        assert caught.value.code == "FAILED_PRECONDITION"
        return str(caught.value)


def test_names_decide_who_is_which_node() -> None:
    door = Door()
    door.come("b")
    assert not door.places.settle(door.present)
    door.come("a")

    assert door.places.settle(door.present) and list(door.places.devices) == ["a", "b"]


def test_a_partition_id_wins_over_the_name() -> None:
    door = Door(3)
    for client, partition in (("a", 12), ("b", 10), ("c", 11)):
        door.come(client, partition_id=partition)

    assert door.places.settle(door.present) and door.places.devices == {"b": 10, "c": 11, "a": 12}


def test_two_devices_cannot_have_one_partition() -> None:
    door = Door()
    door.come("b", partition_id=1)

    assert door.refused("a", partition_id=1) == "partition-id 1 is that of client 'b'; give client 'a' another one"
    door.come("b", partition_id=0)  # it comes back with another one
    door.come("a", partition_id=1)


def test_all_devices_say_a_partition_or_none_does() -> None:
    door = Door()
    door.come("b", partition_id=1)
    assert door.refused("a").startswith("client 'b' says a partition-id, client 'a' none; give --node-config ")

    door = Door()
    door.come("b")
    assert door.refused("a", partition_id=0).startswith("client 'b' says no partition-id, client 'a' one; ")


@pytest.mark.parametrize("partition", ["0", 1.0, True])
def test_a_partition_is_a_whole_number(partition: Setting) -> None:
    assert "it must be a whole number" in Door().refused("a", partition_id=partition)


def test_another_app_and_none_are_told_so() -> None:
    door = Door()
    other = FlowerApp.read(APPS / "legacy")
    assert "runs the Flower app 'averaging', client 'a' has the app 'legacy'; connect with" in door.refused(
        "a", app=other
    )
    with pytest.raises(Denied, match="client 'a' has none; connect with 'shoal flower client'"):
        door.places.admit(wire.Hello(client="a"), [])


def test_no_more_come_in_than_there_are_nodes() -> None:
    door = Door(1)
    door.come("a")

    assert "its devices (a) are connected already; start the server with more --nodes" in door.refused("b")


def test_only_those_that_were_there_at_the_beginning_come_back() -> None:
    door = Door(1)
    door.come("a", partition_id=4)
    door.places.settle(door.present)
    door.present = []
    door.come("a", partition_id=4)

    assert door.refused("a", partition_id=5) == "client 'a' began this run with partition-id 4, and now says 5"
    assert door.refused("b", partition_id=4).startswith("the run has begun with its devices (a); ")


def test_other_files_are_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    door = Door()
    said = write_settings(said_of(APP, {}) | {"files": "other"})
    door.places.admit(wire.Hello(client="a", about=said), [])
    door.come("b")

    assert door.places.differs("a") and not door.places.differs("b")
