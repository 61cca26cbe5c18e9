"""gRPC's health service, asked as a probe does."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest as Request
from grpc_health.v1.health_pb2 import HealthCheckResponse as Response
from grpc_health.v1.health_pb2_grpc import HealthStub

from shoal.protos.transport import SERVICE
from shoal.server.serving import Serving

if TYPE_CHECKING:
    from tests.server.conftest import Serve

WAIT = 10.0


@pytest.fixture
def serving(serve: Serve) -> Serving:
    return serve()


@pytest.fixture
def stub(serving: Serving) -> Iterator[Any]:
    with grpc.insecure_channel(str(serving.address)) as channel:
        yield HealthStub(channel)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_it_serves_until_it_drains(serving: Serving, stub: Any, service: str) -> None:
    before = stub.Check(Request(service=service), timeout=WAIT).status
    serving.drain()
    after = stub.Check(Request(service=service), timeout=WAIT).status

    assert (before, after) == (Response.SERVING, Response.NOT_SERVING)


def test_another_service_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.RpcError, match="there is no service 'other' here") as caught:
        stub.Check(Request(service="other"), timeout=WAIT)

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_whoever_watches_is_told_also_when_another_has_left(serving: Serving, stub: Any) -> None:
    leaves, stays, other = (stub.Watch(Request(service=name), timeout=WAIT) for name in ("", "", "other"))
    first = [next(watch).status for watch in (leaves, stays, other)]
    leaves.cancel()
    assert stub.Check(Request(), timeout=WAIT).status == Response.SERVING
    serving.drain()

    assert first == [Response.SERVING, Response.SERVING, Response.SERVICE_UNKNOWN]
    assert next(stays).status == Response.NOT_SERVING
    late = stub.Watch(Request(), timeout=WAIT)
    assert next(late).status == Response.NOT_SERVING


def test_a_server_that_closes_says_so_to_its_watchers(serving: Serving, stub: Any) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        for response in stub.Watch(Request()):
            heard.put(response.status)
        heard.put(None)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(listen)
        assert heard.get(timeout=WAIT) == Response.SERVING
        serving.close()
        assert heard.get(timeout=WAIT) == Response.NOT_SERVING
        assert heard.get(timeout=WAIT) is None
