"""A process of clients: one real one, or many virtual ones that are each connected as a real one is."""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.client.link import Link
from shoal.client.store import Store
from shoal.client.transfer import Depot, Over, deliver
from shoal.client.workers import WorkerLost, Workers
from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import content_of, encode
from shoal.protos.errors import CodecError, DataError, InvalidUpdate
from shoal.protos.manifest import LIMITS
from shoal.protos.messages import Failure, Setting
from shoal.protos.transport import Address, Certificates

__all__ = ["Settings", "host"]

NAME = re.compile(r"[0-9A-Za-z-]{1,64}")
Note = Callable[[str, str], None]  # the client's name, and a sentence


@dataclass(frozen=True)
class Settings:
    """How this process takes part. ``clients`` says where each one's examples lie (``shard_of`` reads it).

    ``allow`` names the code beside the installation that a server may ask for. ``patience`` is how many seconds to go
    without a server, None for ever; with ``once`` the process ends when the server has finished. ``program`` is the
    module whose ``main`` plays the clients, ``about`` what is said to the server with their names.
    """

    address: Address
    state: Path
    clients: Mapping[str, Mapping[str, Any]]
    certificates: Certificates | None = None
    allow: Sequence[str] = ()
    device: str = "cpu"
    workers: int = 1
    once: bool = False
    patience: float | None = None
    note: Note = field(default=lambda client, text: None)
    program: str = "shoal.client.worker"
    about: Mapping[str, Setting] = field(default_factory=dict)


async def host(settings: Settings) -> None:
    """Until all clients are done; ConnectionRefused if a server says no to one of them."""
    workers, members = Workers(settings.workers, settings.program), list[_Member]()
    try:
        stores = [Store(settings.state, name) for name in settings.clients]
        depot = Depot(stores[0].cache)  # one for all: what is addressed by its content need not come twice
        for store in stores:
            members.append(_Member(settings, store, workers, depot))
        await _look(settings, workers)
        async with asyncio.TaskGroup() as group:
            for member in members:
                group.create_task(member.run())
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        for member in members:
            member.store.close()
        await workers.close()


async def _look(settings: Settings, workers: Workers) -> None:
    """Try the device and the allowed code, and read the data of a single client, before it says hello.

    DataError if that fails.
    """
    (client, data), *more = settings.clients.items()
    job = {"kind": "look", "client": None if more else client, "data": dict(data)}
    try:
        found = await workers.run({**job, "allow": list(settings.allow), "device": settings.device})
    except WorkerLost as error:
        raise DataError(f"the process that reads the data was lost ({error}){_hint(error)}") from error
    if "error" in found:
        raise DataError(found["error"])
    if not more:
        settings.note(client, found["about"])


def _hint(error: WorkerLost) -> str:
    return "; is there enough memory?" if "signal 9" in str(error) else "; see what it said above"


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Member:
    """One client: takes what its link hears, has it trained, brings the answer back."""

    def __init__(self, settings: Settings, store: Store, workers: Workers, depot: Depot) -> None:
        self._settings, self._client, self._workers, self._depot = settings, store.client, workers, depot
        self.store = store
        store.claim()
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        s = self._settings
        self._link = Link(s.address, s.certificates, self._client, self._hear, self._note, s.about)
        try:
            await self._link.run(once=s.once, patience=s.patience)
        finally:
            await self._drop()

    def _note(self, text: str) -> None:
        self._settings.note(self._client, text)

    def _hear(self, reply: wire.ConnectReply) -> None:
        if reply.HasField("offer") and reply.offer.nonce != self._link.working:
            self._take(reply.offer)
        elif reply.HasField("withdrawal") and reply.withdrawal.nonce == self._link.working:
            self._note(f"task withdrawn: {reply.withdrawal.reason}")
            self._leave()

    def _take(self, offer: wire.Offer) -> None:
        self._leave()
        self._link.working = offer.nonce
        self._task = asyncio.create_task(self._work(offer))

    def _leave(self) -> None:
        self._link.working = ""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _drop(self) -> None:
        task = self._task
        self._leave()
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    async def _work(self, offer: wire.Offer) -> None:
        round = 0
        try:
            round = _checked(offer)
            if not self.store.outbox.holds(offer.nonce):  # or it was answered before this process came back
                self.store.outbox.keep_only(offer.nonce)
                await self._answer(offer, round)
            header = self.store.outbox.header(offer.nonce).read_bytes()
            await self._deliver(offer.nonce, round, header)
        except Over as error:
            self._note(f"round {round}: task given up: {error}")
        except Exception as error:  # a full disk, say: the server shall know at once and not wait for the lease's end
            reason = f"client {self._client!r} could not do its task: {type(error).__name__}: {error}"
            header, _ = encode(Failure(self._client, round, reason, traceback.format_exc()).sendable())
            await self._deliver(offer.nonce, round, header)
        finally:
            if self._link.working == offer.nonce:
                self._link.working = ""

    async def _deliver(self, nonce: str, round: int, header: bytes) -> None:
        try:
            receipt = await deliver(self._link, nonce, header, self.store.outbox.payload(nonce))
            self._note(_told(round, header, receipt))
        except (Over, InvalidUpdate) as error:
            self._note(f"round {round}: answer not taken: {error}")

    async def _answer(self, offer: wire.Offer, round: int) -> None:
        """The answer, in the outbox."""
        _, sha256, total = content_of(offer.header)
        task = self.store.outbox.path / f"{offer.nonce}.task"
        task.write_bytes(offer.header)
        job = {
            "kind": "play",
            "nonce": offer.nonce,
            "client": self._client,
            "round": round,
            "counted": offer.counted,
            "assignment": str(await self._depot.fetch(self._link, offer.assignment)),
            "task": str(task),
            "payload": str(await self._depot.fetch(self._link, wire.Content(sha256=sha256, total_bytes=total))),
            "data": dict(self._settings.clients[self._client]),
            "states": str(self.store.run(offer.run)),
            "outbox": str(self.store.outbox.path),
            "allow": list(self._settings.allow),
            "device": self._settings.device,
        }
        try:
            await self._workers.run(job)
        except WorkerLost as error:
            reason = f"client {self._client!r} lost the process that trained it ({error}){_hint(error)}"
            header, payload = encode(Failure(self._client, round, reason).sendable())
            self.store.outbox.put(offer.nonce, header, payload)


def _checked(offer: wire.Offer) -> int:
    """The offer's round; CodecError for names that a server does not give: they become names of files here."""
    for name in (offer.nonce, offer.run):
        if not NAME.fullmatch(name):
            raise CodecError(f"{name[:80]!r} is no name of a task or a run; is this a Shoal server?")
    content, _, _ = content_of(offer.header)
    if content not in ("task", "envelope") or offer.assignment.total_bytes > LIMITS.header:
        raise CodecError(f"the offer brings {content} and {offer.assignment.total_bytes} bytes of assignment")
    return int(getattr(wire.Header.FromString(offer.header), content).round)


def _told(round: int, header: bytes, receipt: wire.Receipt) -> str:
    """What became of an answer, for people."""
    message = wire.Header.FromString(header)
    content, size = message.WhichOneof("content"), message.manifest.total_bytes
    if receipt.status == wire.Receipt.REJECTED:
        return f"round {round}: the server rejected the {content}: {receipt.reason}"
    if content == "failure":
        trace = f"\n{message.failure.traceback}" if message.failure.traceback else ""
        return f"round {round}: failed, and the server knows: {message.failure.reason}{trace}"
    what = "answer" if content == "envelope" else content
    return f"round {round}: {what} delivered" + (f" ({size:,} bytes)" if size else "")
