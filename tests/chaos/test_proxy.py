"""The proxy does to plain sockets what it says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import Proxy, Way, Weather

SENT = bytes(range(256)) * 40
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def through(seed: int = 0) -> AsyncIterator[tuple[Proxy, Callable[[], Awaitable[Streams]]]]:
    """A proxy in front of an echo, and how to connect."""
    writers = list[asyncio.StreamWriter]()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            while data := await reader.read(1000):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connect() -> Streams:
        streams = await asyncio.open_connection("127.0.0.1", proxy.port)
        writers.append(streams[1])
        return streams

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(server.sockets[0].getsockname()[1], random.Random(seed))
    await proxy.start()
    try:
        yield proxy, connect
    finally:
        await proxy.close()
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def echoed(streams: Streams, sent: bytes = SENT) -> bytes:
    """What comes back of ``sent``: less if the connection breaks."""
    reader, writer = streams
    writer.write(sent)
    found = b""
    try:
        async with asyncio.timeout(5):
            while len(found) < len(sent) and (data := await reader.read(len(sent))):
                found += data
    except ConnectionResetError:
        pass
    return found


def test_in_good_weather_nothing_happens() -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            assert await echoed(await connect()) == SENT
            assert proxy.forwarded == {Way.UP: len(SENT), Way.DOWN: len(SENT)}

    asyncio.run(main())


def test_the_end_of_a_stream_is_passed_on() -> None:
    async def main() -> None:
        async with through() as (_, connect):
            reader, writer = await connect()
            writer.write(b"last words")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 5) == b"last words"

    asyncio.run(main())


@pytest.mark.parametrize("way", Way)
def test_what_is_stalled_comes_later(way: Way) -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            streams = await connect()
            proxy.set(Weather(stalled=True), way)
            waiting = asyncio.create_task(echoed(streams))
            done, _ = await asyncio.wait([waiting], timeout=0.1)
            assert not done
            proxy.clear()
            assert await waiting == SENT

    asyncio.run(main())


def test_a_cut_connection_is_reset_and_others_stay() -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            both = [await connect(), await connect()]
            assert [await echoed(streams) for streams in both] == [SENT, SENT]
            assert (proxy.connections, proxy.cut(1)) == (2, 1)
            assert sorted([len(await echoed(streams)) for streams in both]) == [0, len(SENT)]
            assert await echoed(await connect()) == SENT

    asyncio.run(main())


def test_half_open_connections_stay_and_swallow_everything() -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            silent = await connect()
            assert await echoed(silent) == SENT
            assert proxy.silence() == 1
            waiting = asyncio.create_task(echoed(silent))
            assert await echoed(await connect()) == SENT  # a new one is as good as ever
            assert not waiting.done()
            assert proxy.connections == 2
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())


def test_one_bit_flips() -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            streams = await connect()
            assert await echoed(streams, b"hello") == b"hello"
            proxy.flip(Way.UP, within=1000)
            found = await echoed(streams)
            changed = [one ^ other for one, other in zip(found, SENT, strict=True) if one != other]
            assert [value.bit_count() for value in changed] == [1]

    asyncio.run(main())


def test_flips_are_as_many_as_their_rate_says_and_the_seed_draws_them() -> None:
    async def flipped(seed: int) -> bytes:
        async with through(seed) as (proxy, connect):
            proxy.set(Weather(flips=0.01), Way.DOWN)
            return await echoed(await connect())

    one, again, other = (asyncio.run(flipped(seed)) for seed in (1, 1, 2))
    assert 50 < sum(a != b for a, b in zip(one, SENT, strict=True)) < 200
    assert one == again != other


def test_a_torn_connection_ends_amid_its_bytes() -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            streams = await connect()
            assert await echoed(streams, b"hello") == b"hello"
            proxy.tear(Way.DOWN, within=100)
            found = await echoed(streams)
            assert len(found) <= 100 and SENT.startswith(found)
            assert await echoed(await connect()) == SENT

    asyncio.run(main())


def test_nobody_gets_in_while_it_refuses() -> None:
    async def main() -> None:
        async with through() as (proxy, connect):
            proxy.refusing = True
            assert await echoed(await connect()) == b""
            proxy.clear()
            assert await echoed(await connect()) == SENT

    asyncio.run(main())


@pytest.mark.parametrize(
    "weather", [Weather(rate=50_000), Weather(delay=0.2), Weather(loss=0.5)], ids=["slow", "late", "losing"]
)
def test_slow_and_late_bytes_take_their_time(weather: Weather) -> None:
    async def main() -> None:
        async with through(1) as (proxy, connect):
            proxy.set(weather, Way.UP)
            began = time.monotonic()
            assert await echoed(await connect()) == SENT
            assert time.monotonic() - began > 0.19

    asyncio.run(main())


def test_without_a_server_a_connection_is_reset() -> None:
    async def main() -> None:
        nobody = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = nobody.sockets[0].getsockname()[1]
        nobody.close()
        proxy = Proxy(port, random.Random(0))
        await proxy.start()
        streams = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await echoed(streams) == b""
        streams[1].close()
        await proxy.close()

    asyncio.run(main())
