"""What crosses between a server and its clients: all of it, counted and searched."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import shoal
from shoal.compose import Composition
from shoal.protos.transport import Address

if TYPE_CHECKING:
    from tests.shoal.conftest import Start

ROOT = Path(__file__).parent.parent.parent
FIVE = ROOT / "examples" / "five.toml"


class Tap:
    """Passes bytes on between clients and a server, and keeps a copy of all."""

    def __init__(self, server: Address) -> None:
        self._server, self.heard = server, list[bytearray]()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._door.getsockname())
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            server = socket.create_connection((self._server.host, self._server.port))
            for source, sink in ((client, server), (server, client)):
                self.heard.append(bytearray())
                self._threads.append(threading.Thread(target=self._pass, args=(source, sink, self.heard[-1])))
                self._threads[-1].start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, copy: bytearray) -> None:
        with sink:
            while data := _received(source):
                copy += data
                try:
                    sink.sendall(data)
                except OSError:
                    return

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for thread in self._threads:
            thread.join()


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""


def traces(rows: np.ndarray) -> Iterator[bytes]:
    """Pieces of 32 bytes of each row, from where it is not all one value: background is everywhere."""
    flat = np.ascontiguousarray(rows.reshape(len(rows), -1))
    for row in flat:
        varied = np.flatnonzero(row[:-1] != row[1:])
        if len(varied):
            begin = int(varied[len(varied) // 2]) * row.itemsize
            yield row.tobytes()[begin : begin + 32]


@pytest.mark.slow
def test_no_example_leaves_a_client(start: Start, tmp_path: Path) -> None:
    server = start("server", FIVE, "rounds=2", "--listen", "127.0.0.1:0", "--insecure", "--wait-for", 5)
    tap = Tap(Address.parse(server.address))
    hosted = ("--simulate", 5, "--workers", 1, "--once", "--state", tmp_path / "state")
    clients = start("client", "--connect", tap.address, "--insecure", "--data", FIVE, *hosted)

    assert (server.wait(), clients.wait()) == (0, 0), server.text + clients.text
    tap.close()
    heard = b"\n".join(bytes(part) for part in tap.heard)
    composition = Composition(shoal.Experiment.from_file(FIVE))
    assert composition.data is not None
    for client in composition.data.clients:
        shard = composition.data.shard(client)
        x, y = shard.x.numpy()[:100], shard.y.numpy()
        for kind in (x, np.rint(255 * x).astype(np.uint8), x.astype(np.float16)):
            for trace in traces(kind):
                assert trace not in heard
        for labels in (y, y.astype(np.int32), y.astype(np.uint8)):
            assert labels[:32].tobytes() not in heard
        assert str(tmp_path).encode() not in heard
    sent = composition.initial.trainable.numpy().tobytes()
    assert sent[:4096] in heard  # what does cross is found in this way
    assert len(heard) > 20 * len(sent) / 2


@pytest.mark.slow
def test_the_page_counts_what_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import wire  # type: ignore[import-not-found]

    page = wire.PAGE.read_text()
    sys.modules.pop("wire")

    assert wire.fill(page, wire.table(wire.measure())) == page
