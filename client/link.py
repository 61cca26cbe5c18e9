"""One client's connection to its server: dials out, says who it is, stays, and dials again when it breaks.

Nothing here needs torch: a client that waits for work is small.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from grpc import aio

from shoal.client.diagnose import diagnose
from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import ConnectionRefused
from shoal.protos.fleet_pb2_grpc import FleetStub
from shoal.protos.messages import NOTHING, Setting
from shoal.protos.settings import write_settings
from shoal.protos.transport import CAPABILITIES, CHANNEL, SERVICE, VERSIONS, Address, Certificates, software

__all__ = ["Link"]

SLOWEST = 10.0  # seconds between two attempts
HELLO = 20.0  # seconds for the server to answer a Hello
SHORTEST = 0.05  # seconds between two heartbeats, whatever a server says
MISSED = 3  # heartbeats without an answer, after which the connection is taken for dead
FINAL = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class Stub(FleetStub):
    """The calls. The messages of an upload come in wire form (:func:`~shoal.protos.transport.upload_request`)."""

    def __init__(self, channel: aio.Channel) -> None:
        super().__init__(channel)  # type: ignore[call-arg]  # its types know only __new__
        self.Upload: Any = channel.stream_unary(f"/{SERVICE}/Upload", response_deserializer=wire.UploadReply.FromString)


class Link:
    """``heard`` gets each offer and withdrawal; ``note`` gets sentences for people; ``about`` is said of the client.

    :attr:`session` is the token for other calls; :attr:`working` names the task in hand in every heartbeat.
    """

    def __init__(
        self,
        address: Address,
        certificates: Certificates | None,
        client: str,
        heard: Callable[[wire.ConnectReply], None],
        note: Callable[[str], None],
        about: Mapping[str, Setting] = NOTHING,
    ) -> None:
        self._address, self._certificates, self.client = address, certificates, client
        self._heard, self._note, self._about = heard, note, write_settings(about)
        self._instance, self.working = secrets.token_hex(8), ""
        self._session, self._connected = "", asyncio.Event()
        self._dial()

    def _dial(self) -> None:
        self._channel = self._open()
        self.stub: Any = Stub(self._channel)

    async def _dial_anew(self) -> None:
        """On a TCP connection of its own: the old one may be half open, and its channel would not know for long.

        Calls that are still on it are cancelled.
        """
        before = self._channel
        self._dial()
        await before.close()

    def _open(self) -> aio.Channel:
        options = [*CHANNEL, ("grpc.enable_http_proxy", 0 if self._address.loopback else 1)]
        if self._certificates is None:
            return aio.insecure_channel(str(self._address), options=options)
        return aio.secure_channel(str(self._address), self._certificates.for_client(), options=options)

    async def session(self) -> str:
        """The token of the connection, as soon as there is one."""
        await self._connected.wait()
        return self._session

    async def run(self, *, once: bool, patience: float | None) -> None:
        """Until the server has finished (with ``once``); ConnectionRefused if it says no.

        ``patience`` is how many seconds to go without a server; None: for ever.
        """
        last, pause, said = time.monotonic(), 0.5, ""
        try:
            while True:
                silent = False
                try:
                    finished = await self._converse()
                    if finished and once:
                        return
                    reason = "the server has finished its runs" if finished else "the server closed the connection"
                except aio.AioRpcError as error:
                    reason = await self._reason(error)
                except ConnectionError as error:
                    reason = str(error) or "the connection broke"
                except TimeoutError:
                    reason, silent = "the server does not answer", True
                if self._connected.is_set():
                    self._connected.clear()
                    last, pause, said = time.monotonic(), 0.5, ""
                if silent:
                    await self._dial_anew()
                if patience is not None and time.monotonic() - last > patience:
                    raise ConnectionRefused(reason or f"the server at {self._address} does not answer")
                if reason and reason != said:
                    self._note(f"{reason}; trying again")
                    said = reason
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # not all clients at once
                pause = min(2 * pause, SLOWEST)
        finally:
            await self._channel.close()

    async def _converse(self) -> bool:
        """One connection from Hello to Goodbye; whether the server has finished. The errors are those of gRPC."""
        call = self.stub.Connect()
        hello = wire.Hello(
            versions=VERSIONS,
            software=software(),
            capabilities=CAPABILITIES,
            client=self.client,
            instance=self._instance,
            about=self._about,
        )
        try:
            await call.write(wire.ConnectRequest(hello=hello))
            welcome = (await self._read(call, HELLO)).welcome
            if welcome.version not in VERSIONS:
                raise ConnectionRefused(
                    f"the server ({welcome.software or 'unknown'}) chose protocol {welcome.version}, this client "
                    f"({software()}) speaks {', '.join(map(str, VERSIONS))}; upgrade this client"
                )
            self._session = welcome.session
            self._connected.set()
            self._note(f"connected to {self._address} ({welcome.software})")
            pulse = max(welcome.heartbeat, SHORTEST)
            beating = asyncio.create_task(self._beat(call, pulse))
            try:
                return await self._listen(call, MISSED * pulse)
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
        finally:
            call.cancel()

    async def _listen(self, call: Any, silence: float) -> bool:
        while True:
            reply = await self._read(call, silence)
            if not reply.HasField("goodbye"):
                self._heard(reply)
                continue
            goodbye = reply.goodbye
            if goodbye.advice == wire.Goodbye.REPLACED:
                raise ConnectionRefused(f"{goodbye.reason}; if that was not meant, give each client its own --id")
            return bool(goodbye.advice == wire.Goodbye.FINISHED)

    async def _read(self, call: Any, seconds: float) -> wire.ConnectReply:
        async with asyncio.timeout(seconds):  # not wait_for, which swallows a cancellation that comes with a reply
            reply = await call.read()
        if isinstance(reply, wire.ConnectReply):
            return reply
        code = await call.code()  # the end of the stream: raise what it ended with
        if code is not grpc.StatusCode.OK:
            raise aio.AioRpcError(
                code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
        raise ConnectionError("the server closed the connection")

    async def _beat(self, call: Any, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await call.write(wire.ConnectRequest(heartbeat=wire.Heartbeat(nonce=self.working)))

    async def _reason(self, error: aio.AioRpcError) -> str:
        """Why the connection failed, in a sentence; ConnectionRefused if trying again cannot help."""
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise ConnectionRefused(f"what answers at {self._address} is no Shoal server; correct the address")
        if code in FINAL:
            raise ConnectionRefused(details or f"the server at {self._address} says no ({code.name.lower()})")
        if code is grpc.StatusCode.UNAVAILABLE:
            folder = None if self._certificates is None else self._certificates.folder
            found = await asyncio.to_thread(diagnose, self._address, folder)
            return found or ("the connection broke" if self._connected.is_set() else "")  # else: it is just coming up
        return f"the connection failed ({code.name.lower()}: {details or 'no reason given'})"
