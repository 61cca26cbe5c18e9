"""The server's numbers and its health over HTTP: ``/metrics`` for Prometheus, ``/healthz`` for probes.

It runs in threads of its own, so that it can say that the event loop hangs, and nobody who calls it slows the run.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client.exposition import choose_encoder

from shoal.protos.errors import ConnectionRefused
from shoal.protos.transport import Address
from shoal.server.metrics import Metrics
from shoal.server.serving import Serving

__all__ = ["Monitor"]

PATIENCE = 2.0  # seconds for the event loop to answer
IDLE = 5.0  # seconds that a caller may do nothing
CALLERS = 16  # at a time; others are hung up on


class Monitor:
    """Listens from the moment it is made until :meth:`close`; to be made in the coordinator's thread.

    ConnectionRefused if the address cannot be had.
    """

    def __init__(self, address: Address, serving: Serving) -> None:
        self._serving, self._coordinator = serving, threading.current_thread()
        self._metrics = Metrics(serving.board)
        try:
            self._http = _listen(address, self)
        except (OSError, UnicodeError) as error:
            raise ConnectionRefused(
                f"cannot show metrics at {address} ({getattr(error, 'strerror', None) or error}); choose another "
                f"address with --http, or stop the program that uses it"
            ) from error
        self.address = Address(address.host, self._http.server_address[1])
        serving.watchers.append(self._metrics.hear)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), name="shoal-http", daemon=True)
        self._thread.start()

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """In the format that the caller accepts, and its name."""
        encode, kind = choose_encoder(accept)
        return encode(self._metrics), kind

    def health(self) -> dict[str, Any]:
        """``ok``, and why not if it is not."""
        board, reason = self._serving.board, ""
        try:
            disk, draining = self._serving.call(lambda: (board.disk, board.draining), timeout=PATIENCE)
        except TimeoutError:
            return {"ok": False, "reason": f"the event loop does not answer within {PATIENCE:g} s"}
        if not self._coordinator.is_alive():
            reason = "the coordinator's thread has ended"
        elif disk is not None:
            reason = f"the disk takes no more: {disk[0]}"
        return {"ok": not reason, "reason": reason, "draining": draining}

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._serving.watchers.remove(self._metrics.hear)


def _listen(address: Address, monitor: Monitor) -> _Server:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, place = found[0]
    return _Server(family, place, monitor)


class _Server(ThreadingTCPServer):
    """A few callers at a time, each in a thread."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 2 * CALLERS

    def __init__(self, family: int, place: Any, monitor: Monitor) -> None:
        self.address_family, self.monitor, self._free = family, monitor, threading.Semaphore(CALLERS)
        super().__init__(place, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a caller that hangs up is none of our errors
            logging.getLogger("shoal").exception("a call to the monitor has failed")


class _Handler(BaseHTTPRequestHandler):
    timeout = IDLE
    server: _Server

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(HTTPStatus.OK, *self.server.monitor.metrics(self.headers.get("Accept", "")))
            case "/healthz":
                health = self.server.monitor.health()
                code = HTTPStatus.OK if health["ok"] else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(code, json.dumps(health).encode() + b"\n", "application/json")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"there are /metrics and /healthz\n", "text/plain")

    def _answer(self, code: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "shoal"

    def log_message(self, format: str, *arguments: Any) -> None:
        return
