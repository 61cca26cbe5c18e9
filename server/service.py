"""The gRPC service: translates calls to the hub and its errors to status codes. Nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.transport import BOARD, SERVICE, blocks, chunk
from shoal.server.board import Board
from shoal.server.hub import Hub
from shoal.server.intake import Intake
from shoal.server.orders import Denied, Disk, Moved, Session

__all__ = ["board_handlers", "handlers"]

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Context = aio.ServicerContext[Any, Any]
UPLOADS, DOWNLOADS = 8, 16  # at a time; the others wait, and flow control holds their bytes back
QUICK = 1.0  # seconds that a transfer keeps its place while its peer does nothing
IDLE = 60.0  # seconds that a peer may do nothing within a stream
LONGEST = 4000  # characters of an error on the wire: a longer one does not fit into HTTP/2 headers


def handlers(hub: Hub) -> grpc.GenericRpcHandler:
    """The service as gRPC wants it. Requests come as bytes, so that what cannot be parsed is answered with a reason."""
    service, denying = _Service(hub), partial(_denying, hub=hub)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Connect": grpc.stream_stream_rpc_method_handler(denying(service.connect)),
            "Download": grpc.unary_stream_rpc_method_handler(denying(service.download)),
            "Begin": grpc.unary_unary_rpc_method_handler(denying(service.begin)),
            "Upload": grpc.stream_unary_rpc_method_handler(denying(service.upload)),
            "Commit": grpc.unary_unary_rpc_method_handler(denying(service.commit)),
        },
    )


def board_handlers(board: Board) -> grpc.GenericRpcHandler:
    """The second service: what the server shows to those who run it."""

    async def status(request: bytes, context: Context) -> bytes:
        _parse(wire.StatusRequest, request)
        return board.status().SerializeToString()

    denying = partial(_denying, hub=board.hub)
    return grpc.method_handlers_generic_handler(BOARD, {"Status": grpc.unary_unary_rpc_method_handler(denying(status))})


class _Service:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._uploads, self._downloads = asyncio.Semaphore(UPLOADS), asyncio.Semaphore(DOWNLOADS)

    async def connect(self, requests: AsyncIterator[bytes], context: Context) -> None:
        first = _parse(wire.ConnectRequest, await _in_time(_next(requests)))
        if not first.HasField("hello"):
            raise Denied("INVALID_ARGUMENT", "the first message of Connect must be a Hello")
        session = self._hub.join(first.hello, _identity(context), context.peer())
        listening = asyncio.create_task(self._listen(session, requests))
        try:
            while (reply := await session.outgoing.get()) is not None:
                await _in_time(context.write(reply.SerializeToString()))
        finally:
            self._hub.leave(session, "it closed the connection")
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    async def _listen(self, session: Session, requests: AsyncIterator[bytes]) -> None:
        try:
            async for request in requests:
                message = _parse(wire.ConnectRequest, request)
                if message.HasField("heartbeat"):
                    self._hub.beat(session, message.heartbeat.nonce)
        except Denied:  # bytes that are no message: the connection ends, the client may come back
            pass
        finally:
            session.outgoing.put_nowait(None)

    async def download(self, request: bytes, context: Context) -> None:
        wanted = _parse(wire.DownloadRequest, request)
        async with _Place(self._downloads) as place:
            blob = self._hub.blob(self._hub.session(wanted.session), wanted.sha256)
            for offset, data in blocks(blob.buffers, wanted.offset):
                # Each chunk is a sign of life; and the end, if the connection or the round is over.
                self._hub.blob(self._hub.session(wanted.session), wanted.sha256)
                await place.while_waiting(context.write(chunk(offset, data)))
                self._hub.tell(Moved(down=data.nbytes))

    async def begin(self, request: bytes, context: Context) -> bytes:
        asked = _parse(wire.BeginRequest, request)
        offset = self._hub.begin(self._hub.session(asked.session), asked.nonce, asked.header)
        return wire.BeginReply(offset=offset).SerializeToString()

    async def upload(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        async with _Place(self._uploads) as place:
            first = _parse(wire.UploadRequest, await place.while_waiting(_next(requests)))
            piece, intake = first, Intake(lambda count: self._hub.tell(Moved(up=count)))
            try:
                while True:
                    await intake.put(self._hub.incoming(self._hub.session(first.session), first.nonce), piece.chunk)
                    request = await place.while_waiting(_next(requests))
                    if request is None:
                        break
                    piece = _parse(wire.UploadRequest, request)
                return wire.UploadReply(offset=await intake.end()).SerializeToString()
            except CodecError as error:  # not the answer's end: the client goes on from where it was right
                raise Denied("ABORTED", str(error)) from error
            finally:
                await intake.settle()

    async def commit(self, request: bytes, context: Context) -> bytes:
        asked = _parse(wire.CommitRequest, request)
        receipt = await self._hub.commit(self._hub.session(asked.session), asked.nonce)
        return receipt.SerializeToString()


def _parse(kind: type[M], data: bytes | None) -> M:
    try:
        return kind.FromString(data or b"")
    except DecodeError as error:
        name = kind.DESCRIPTOR.name
        raise Denied("INVALID_ARGUMENT", f"the request is no {name} ({error}); run the same version") from error


class _Place:
    """One transfer's place among those that may hold bytes in memory.

    It is left while the peer keeps the transfer waiting: a few slow or dead ones must not stop all others.
    """

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free, self._taken = free, False

    async def __aenter__(self) -> _Place:
        await self._take()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    async def _take(self) -> None:
        await self._free.acquire()
        self._taken = True

    def _leave(self) -> None:
        if self._taken:
            self._free.release()
            self._taken = False

    async def while_waiting(self, peer: Coroutine[Any, Any, T]) -> T:
        """What the peer sends, or that it has read; Denied if it does nothing for too long."""
        leaving = asyncio.get_running_loop().call_later(QUICK, self._leave)
        try:
            found = await _in_time(peer)
        finally:
            leaving.cancel()
        if not self._taken:
            await self._take()
        return found


async def _next(requests: AsyncIterator[bytes]) -> bytes | None:
    """The next message of a stream, None at its end."""
    return await anext(requests, None)


async def _in_time(peer: Coroutine[Any, Any, T]) -> T:
    """What is waited for; Denied if it does not come."""
    try:
        async with asyncio.timeout(IDLE):
            return await peer
    except TimeoutError as error:
        raise Denied("DEADLINE_EXCEEDED", f"nothing moved for {IDLE:.0f} s; call again and go on") from error


def _identity(context: Context) -> str:
    """The common name of the client's certificate; empty without TLS."""
    names = list(context.auth_context().get("x509_common_name", ()))
    return names[0].decode("utf-8", "replace") if names else ""


async def _abort(context: Context, error: Denied | CodecError | OSError) -> None:
    if isinstance(error, OSError):
        code, text = "RESOURCE_EXHAUSTED", f"the server cannot store the answer ({error.strerror}); try again later"
    else:
        code, text = getattr(error, "code", "INVALID_ARGUMENT"), str(error)
    while len(quote(text)) > LONGEST:
        text = text[: len(text) * 3 // 4]
    await context.abort(getattr(grpc.StatusCode, code), text)


def _denying(call: Callable[[Any, Context], Awaitable[Any]], hub: Hub) -> Callable[[Any, Context], Awaitable[Any]]:
    async def handler(request: Any, context: Context) -> Any:
        try:
            return await call(request, context)
        except (Denied, CodecError, OSError) as error:
            if isinstance(error, OSError):  # the disk does not take what the client sent
                hub.tell(Disk(error.strerror or str(error)))
            return await _abort(context, error)
        except aio.InternalError as error:  # the peer hung up while it was written to: as if cancelled
            raise asyncio.CancelledError from error

    return handler
