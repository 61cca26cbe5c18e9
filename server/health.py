"""gRPC's own health service, for probes: serving from the start, until the server is about to stop.

The messages are those of ``grpcio-health-checking``. Its servicer is not used: when one of several watchers leaves, the
others hear nothing any more (``finally: del self._server_watchers[…]`` in its ``_async.py``).
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal.protos.transport import SERVICE

__all__ = ["Health"]

Status = health_pb2.HealthCheckResponse
Context = aio.ServicerContext[Any, Any]
KNOWN = ("", SERVICE)  # the server as a whole, and its service


class Health(health_pb2_grpc.HealthServicer):
    """To be made on the server's loop."""

    def __init__(self) -> None:
        self._draining, self._closed = asyncio.Event(), asyncio.Event()

    def add_to(self, server: aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def drain(self) -> None:
        """From now on NOT_SERVING, which whoever watches is told."""
        self._draining.set()

    def close(self) -> None:
        """After :meth:`drain`: nobody may watch any more, or the server would wait for it."""
        self._closed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Status:
        if request.service not in KNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r} here")
        return self._now()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        if request.service not in KNOWN:
            await context.write(Status(status=Status.SERVICE_UNKNOWN))
        else:
            if not self._draining.is_set():
                await context.write(self._now())
                await self._draining.wait()
            await context.write(self._now())
        await self._closed.wait()

    def _now(self) -> Status:
        return Status(status=Status.NOT_SERVING if self._draining.is_set() else Status.SERVING)
