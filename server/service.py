"""The gRPC service: translates calls to the hub and its errors to status codes. Nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.transport import SERVICE, chunks
from shoal.server.hub import Denied, Hub, Session

__all__ = ["handlers"]

M = TypeVar("M", bound=Message)
Context = aio.ServicerContext[Any, Any]
UPLOADS, DOWNLOADS = 8, 16  # at a time; the others wait, and flow control holds their bytes back
IDLE = 60.0  # seconds that a caller may be silent within a stream of chunks


def handlers(hub: Hub) -> grpc.GenericRpcHandler:
    """The service as gRPC wants it. Requests come as bytes, so that what cannot be parsed is answered with a reason."""
    service = _Service(hub)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Connect": grpc.stream_stream_rpc_method_handler(_denying(service.connect)),
            "Download": grpc.unary_stream_rpc_method_handler(_denying_stream(service.download)),
            "Begin": grpc.unary_unary_rpc_method_handler(_denying(service.begin)),
            "Upload": grpc.stream_unary_rpc_method_handler(_denying(service.upload)),
            "Commit": grpc.unary_unary_rpc_method_handler(_denying(service.commit)),
        },
    )


class _Service:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._uploads, self._downloads = asyncio.Semaphore(UPLOADS), asyncio.Semaphore(DOWNLOADS)

    async def connect(self, requests: AsyncIterator[bytes], context: Context) -> None:
        first = _parse(wire.ConnectRequest, await _next(requests))
        if not first.HasField("hello"):
            raise Denied("INVALID_ARGUMENT", "the first message of Connect must be a Hello")
        session = self._hub.join(first.hello, _identity(context), context.peer())
        listening = asyncio.create_task(self._listen(session, requests))
        try:
            while (reply := await session.outgoing.get()) is not None:
                await context.write(reply.SerializeToString())
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            self._hub.leave(session, "it closed the connection")

    async def _listen(self, session: Session, requests: AsyncIterator[bytes]) -> None:
        try:
            async for request in requests:
                if _parse(wire.ConnectRequest, request).HasField("heartbeat"):
                    self._hub.beat(session)
        except Denied:  # bytes that are no message: the connection ends, the client may come back
            pass
        finally:
            session.outgoing.put_nowait(None)

    async def download(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        wanted = _parse(wire.DownloadRequest, request)
        session = self._hub.session(wanted.session)
        async with self._downloads:
            for chunk in chunks(self._hub.blob(session, wanted.sha256).buffers, wanted.offset):
                self._hub.blob(session, wanted.sha256)  # a sign of life; and the end, if the round is over
                yield chunk.SerializeToString()

    async def begin(self, request: bytes, context: Context) -> bytes:
        asked = _parse(wire.BeginRequest, request)
        offset = self._hub.begin(self._hub.session(asked.session), asked.nonce, asked.header)
        return wire.BeginReply(offset=offset).SerializeToString()

    async def upload(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        async with self._uploads:
            first = _parse(wire.UploadRequest, await _next(requests))
            session = self._hub.session(first.session)
            offset, request = await self._hub.incoming(session, first.nonce).append(first.chunk), await _next(requests)
            while request:
                chunk = _parse(wire.UploadRequest, request).chunk
                offset = await self._hub.incoming(session, first.nonce).append(chunk)
                request = await _next(requests)
        return wire.UploadReply(offset=offset).SerializeToString()

    async def commit(self, request: bytes, context: Context) -> bytes:
        asked = _parse(wire.CommitRequest, request)
        receipt = await self._hub.commit(self._hub.session(asked.session), asked.nonce)
        return receipt.SerializeToString()


def _parse(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        name = kind.DESCRIPTOR.name
        raise Denied("INVALID_ARGUMENT", f"the request is no {name} ({error}); run the same version") from error


async def _next(requests: AsyncIterator[bytes]) -> bytes:
    """The next message of a stream, empty at its end; Denied if it does not come."""
    try:
        return await asyncio.wait_for(anext(requests, b""), IDLE)
    except TimeoutError as error:
        raise Denied("DEADLINE_EXCEEDED", f"nothing came for {IDLE:.0f} s; call again and go on") from error


def _identity(context: Context) -> str:
    """The common name of the client's certificate; empty without TLS."""
    names = list(context.auth_context().get("x509_common_name", ()))
    return names[0].decode("utf-8", "replace") if names else ""


async def _abort(context: Context, error: Denied | CodecError | OSError) -> None:
    if isinstance(error, OSError):
        code, text = "RESOURCE_EXHAUSTED", f"the server cannot store the answer ({error.strerror}); try again later"
    else:
        code, text = getattr(error, "code", "INVALID_ARGUMENT"), str(error)
    await context.abort(getattr(grpc.StatusCode, code), text[:4000])  # longer ones do not fit into HTTP/2 headers


def _denying(call: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def handler(request: Any, context: Context) -> Any:
        try:
            return await call(request, context)
        except (Denied, CodecError, OSError) as error:
            return await _abort(context, error)

    return handler


def _denying_stream(call: Callable[[Any, Context], AsyncIterator[bytes]]) -> Callable[[Any, Context], Any]:
    async def handler(request: Any, context: Context) -> AsyncIterator[bytes]:
        try:
            async for reply in call(request, context):
                yield reply
        except (Denied, CodecError, OSError) as error:
            await _abort(context, error)

    return handler
