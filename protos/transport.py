"""What both ends of a connection agree on: version, limits, chunks, addresses, certificates.

Only this module and the two ends that use it know of gRPC.
"""

from __future__ import annotations

import ipaddress
import ssl
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError, ConnectionRefused

__all__ = [
    "BOARD",
    "CAPABILITIES",
    "CHANNEL",
    "CHUNK",
    "SERVER",
    "SERVICE",
    "VERSIONS",
    "Address",
    "Certificates",
    "blocks",
    "check_exposure",
    "chunk",
    "data_of",
    "software",
    "upload_request",
]

VERSIONS = (1,)  # of the protocol
CAPABILITIES: tuple[str, ...] = ()
SERVICE, BOARD = "shoal.fleet.v1.Fleet", "shoal.fleet.v1.Board"
CHUNK = 2**20  # bytes: the fastest on a loopback among 64 KiB to 16 MiB
MESSAGE = 2**22  # bytes: a chunk or a header of 1 MiB with room to spare

_COMMON = [
    ("grpc.max_receive_message_length", MESSAGE),
    ("grpc.max_send_message_length", MESSAGE),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL = [
    *_COMMON,
    ("grpc.use_local_subchannel_pool", 1),  # each client a TCP connection of its own, as devices have
    ("grpc.keepalive_time_ms", 30_000),  # a connection that swallows everything ends within these two
    ("grpc.http2.ping_timeout_ms", 10_000),  # 60 s unless set, whatever the next one says
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
SERVER = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # or a second server on the same port would take every other client
    ("grpc.http2.bdp_probe", 0),  # or windows grow, and with them the bytes of each client that wait in memory
    ("grpc.http2.lookahead_bytes", 2**18),
    ("grpc.keepalive_time_ms", 60_000),  # finds out who is gone without a word
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),  # or the pings of a client that waits to call again are too many
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),  # less than clients wait between two pings
    ("grpc.max_metadata_size", 16_384),
    ("grpc.server_handshake_timeout_ms", 20_000),
]


def software() -> str:
    """This program and its version, for people."""
    return f"shoal {version('shoal')}"


@dataclass(frozen=True)
class Address:
    """``HOST:PORT``; IPv6 hosts stand in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """ConnectionRefused if the text is no address."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535 or not _is_host(host):
            raise ConnectionRefused(f"{text!r} is not of the form HOST:PORT, for example 127.0.0.1:8470 or [::1]:8470")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether it can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _is_host(host: str) -> bool:
    """A name or an IPv4 address as it is, an IPv6 address in brackets."""
    if host.startswith("[") and host.endswith("]"):
        try:
            return ipaddress.ip_address(host[1:-1].partition("%")[0]).version == 6
        except ValueError:
            return False
    return not set(host) & set("[]:/@ ")


@dataclass(frozen=True)
class Certificates:
    """What one side proves itself with and trusts: the contents of ``ca.pem``, ``cert.pem`` and ``key.pem``."""

    folder: Path
    ca: bytes
    cert: bytes
    key: bytes

    @classmethod
    def read(cls, folder: Path) -> Certificates:
        """ConnectionRefused if a file is missing or damaged, or the key is not the certificate's."""
        found = []
        for name, what in (("ca.pem", "CERTIFICATE"), ("cert.pem", "CERTIFICATE"), ("key.pem", "PRIVATE KEY")):
            try:
                content = (folder / name).read_bytes()
            except OSError as error:
                raise ConnectionRefused(
                    f"{str(folder / name)!r} cannot be read ({error.strerror}); --tls needs a folder with ca.pem, "
                    f"cert.pem and key.pem"
                ) from error
            if f"{what}-----".encode() not in content:
                raise ConnectionRefused(f"{str(folder / name)!r} holds no PEM {what.lower()}; see docs/deployment.md")
            found.append(content)
        _check_use(folder)
        return cls(folder, *found)

    def for_server(self) -> grpc.ServerCredentials:
        """Mutual TLS: clients must show a certificate of the same CA."""
        return grpc.ssl_server_credentials([(self.key, self.cert)], self.ca, require_client_auth=True)

    def for_client(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


def _check_use(folder: Path) -> None:
    """gRPC says only that it failed to bind, or nothing at all; OpenSSL says why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem", password=lambda: b"")  # or it would ask
    except OSError as error:
        reason = str(getattr(error, "reason", None) or "damaged").replace("_", " ").lower()
        raise ConnectionRefused(
            f"the certificates in {str(folder)!r} cannot be used ({reason}): ca.pem and cert.pem must be whole, and "
            f"key.pem the certificate's own, without a password"
        ) from error


def check_exposure(address: Address, tls: Path | None, insecure: bool, force: bool) -> Certificates | None:
    """The certificates, or None for plain text; ConnectionRefused where that was not asked for or is unsafe."""
    if tls is not None and insecure:
        raise ConnectionRefused("--tls and --insecure exclude each other; give one of them")
    if tls is not None:
        return Certificates.read(tls)
    if not insecure:
        raise ConnectionRefused(
            "give --tls DIR for an encrypted connection, or --insecure for one in plain text on this machine"
        )
    if not address.loopback and not force:
        raise ConnectionRefused(
            f"--insecure would carry models in plain text beyond this machine ({address}); give --tls DIR, or "
            f"--force as well if the network is protected in another way"
        )
    return None


def blocks(buffers: Sequence[memoryview], offset: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes of several buffers, one behind the other, from ``offset`` on, in pieces with their own offsets."""
    start = 0
    for buffer in buffers:
        position = max(offset - start, 0)
        while position < buffer.nbytes:
            data = buffer[position : position + CHUNK]
            yield start + position, data
            position += data.nbytes
        start += buffer.nbytes


def chunk(offset: int, data: memoryview) -> bytes:
    """A Chunk in wire form."""
    return b"".join(_chunk(offset, data))


def upload_request(session: str, nonce: str, offset: int, data: memoryview) -> bytes:
    """An UploadRequest in wire form."""
    head = wire.UploadRequest(session=session, nonce=nonce).SerializeToString()
    parts = _chunk(offset, data)
    return b"".join((head, _prefix(wire.UploadRequest.CHUNK_FIELD_NUMBER, sum(map(len, parts))), *parts))


def _chunk(offset: int, data: memoryview) -> tuple[bytes, bytes, memoryview]:
    """A Chunk in wire form, whose bytes stay where they are: protobuf would copy them three times."""
    rest = wire.Chunk(offset=offset, crc32=zlib.crc32(data)).SerializeToString()
    return rest, _prefix(wire.Chunk.DATA_FIELD_NUMBER, data.nbytes), data


def _prefix(field: int, length: int) -> bytes:
    """What stands before the bytes of a field (https://protobuf.dev/programming-guides/encoding/)."""
    found = bytearray([field << 3 | 2])
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    found.append(length)
    return bytes(found)


def data_of(chunk: wire.Chunk, offset: int, total: int) -> bytes:
    """The chunk's bytes; CodecError unless it is whole, begins at ``offset`` and fits into ``total`` bytes."""
    data = chunk.data  # a copy each time
    if chunk.offset != offset:
        raise CodecError(f"a chunk begins at byte {chunk.offset}, expected {offset}; go on from there")
    if not data or offset + len(data) > total:
        raise CodecError(f"a chunk of {len(data)} bytes at {offset} does not fit into {total} bytes")
    if zlib.crc32(data) != chunk.crc32:
        raise CodecError(f"the chunk at byte {offset} is damaged: its CRC-32 differs; send it again")
    return data
