"""Which device is which node of an app that is served: a door that lets in as many as the run has, and their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shoal.flower.app import FlowerApp
from shoal.protos import fleet_pb2 as wire
from shoal.protos.messages import NOTHING, Setting
from shoal.protos.settings import read_settings
from shoal.server.orders import Denied

__all__ = ["PARTITION", "Places", "said_of"]

PARTITION = "partition-id"


def said_of(app: FlowerApp, own: Mapping[str, Setting]) -> dict[str, Setting]:
    """What a device says of itself when it calls: its app, and its place where it was given one."""
    place = {PARTITION: own[PARTITION]} if PARTITION in own else {}
    return {"app": app.name, "files": app.hash, **place}


class Places:
    """``wanted`` of them, given to devices in the order of their ``partition-id`` if they say one, else of their names.

    ``devices`` are those that have them, by rank, with their partition-id: of a run that goes on from the beginning,
    else from :meth:`settle` on; then nothing changes any more. Lives on the loop of the server.
    """

    def __init__(self, app: FlowerApp, wanted: int, devices: Mapping[str, int | None] = NOTHING) -> None:
        self._app, self._files, self.wanted = app, app.hash, wanted
        self._said = dict[str, Mapping[str, Setting]]()
        self.devices = devices

    def admit(self, hello: wire.Hello, present: Collection[str]) -> None:
        """Denied, with what to do, for a device that can have no place."""
        said, others = read_settings(hello.about), [name for name in present if name != hello.client]
        if said.get("app") != self._app.name:
            has = f"has the app {said['app']!r:.80}" if "app" in said else "has none"
            raise _denied(
                f"this server runs the Flower app {self._app.name!r}, client {hello.client!r} {has}; connect with "
                f"'shoal flower client' and the folder of that app"
            )
        if self.devices:
            self._check_return(hello.client, said)
        elif len(others) >= self.wanted:
            raise _denied(f"{self._those(others)} are connected already; start the server with more --nodes")
        else:
            self._check_place(hello.client, said.get(PARTITION), others)
        self._said[hello.client] = said

    def _check_return(self, client: str, said: Mapping[str, Setting]) -> None:
        if client not in self.devices:
            raise _denied(f"the run has begun with {self._those(self.devices)}; wait for another run")
        before, now = self.devices[client], said.get(PARTITION)
        if now != before:
            raise _denied(f"client {client!r} began this run with partition-id {before!r}, and now says {now!r:.80}")

    def _check_place(self, client: str, given: Setting | None, others: Sequence[str]) -> None:
        if given is not None and type(given) is not int:
            raise _denied(f"the partition-id of client {client!r} is {given!r:.80}; it must be a whole number")
        for other in others:
            its = self._partition(other)
            if (its is None) != (given is None):
                raise _denied(
                    f"client {other!r} says {'no' if its is None else 'a'} partition-id, client {client!r} "
                    f"{'one' if its is None else 'none'}; give --node-config 'partition-id=…' to all devices or to none"
                )
            if given is not None and its == given:
                raise _denied(f"partition-id {given} is that of client {other!r}; give client {client!r} another one")

    def _those(self, names: Collection[str]) -> str:
        shown = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
        return f"its devices ({shown})"

    def settle(self, present: Collection[str]) -> bool:
        """Give the places away once there are enough devices; whether all that have one are here."""
        if len(present) < self.wanted:
            return False
        if not self.devices:
            given = {name: self._partition(name) for name in present}
            self.devices = dict(sorted(given.items(), key=lambda device: (device[1] or 0, device[0])))
        return True

    def _partition(self, client: str) -> int | None:
        found = self._said[client].get(PARTITION)
        return found if isinstance(found, int) else None

    def differs(self, client: str) -> bool:
        """Whether the files of a device's app are not those of the server's."""
        return self._said.get(client, {}).get("files") != self._files


def _denied(message: str) -> Denied:
    return Denied("FAILED_PRECONDITION", message)
