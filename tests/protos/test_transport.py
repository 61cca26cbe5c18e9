"""Addresses, what may be exposed, certificates on disk, and bytes in chunks."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protos import fleet_pb2 as wire
from shoal.protos import transport
from shoal.protos.errors import CodecError, ConnectionRefused
from shoal.protos.transport import Address, Certificates, blocks, check_exposure, chunk, data_of, upload_request

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
HERE, AWAY = Address("127.0.0.1", 8470), Address("0.0.0.0", 8470)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8470", "127.0.0.1", 8470),
        ("example.org:0", "example.org", 0),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    address = Address.parse(text)

    assert (address, str(address)) == (Address(host, port), text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", ":1", "host:", "host:a", "host:-1", "host:65536", "host:1.5", "::1:8470", "http://host:80"),
        *("[::1:8470", "::1]:8470", "[]:80", "[host]:80", "[127.0.0.1]:80", "a b:80", "me@host:80", "host/path:80"),
    ],
)
def test_what_is_no_address_is_said_so(text: str) -> None:
    with pytest.raises(ConnectionRefused, match="not of the form HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("localhost.example.org", False)),
    ],
)
def test_loopback_is_this_machine_only(host: str, loopback: bool) -> None:
    assert Address(host, 1).loopback is loopback


def test_plain_text_must_be_asked_for_and_stays_on_this_machine() -> None:
    assert check_exposure(HERE, None, insecure=True, force=False) is None
    assert check_exposure(AWAY, None, insecure=True, force=True) is None
    with pytest.raises(ConnectionRefused, match=r"give --tls DIR .* or --insecure"):
        check_exposure(HERE, None, insecure=False, force=True)
    with pytest.raises(ConnectionRefused, match=r"plain text beyond this machine \(0\.0\.0\.0:8470\); .* or --force"):
        check_exposure(AWAY, None, insecure=True, force=False)


def test_tls_and_insecure_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefused, match="exclude each other"):
        check_exposure(HERE, tmp_path, insecure=True, force=True)


def test_missing_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----")
    with pytest.raises(ConnectionRefused, match=r"cert\.pem' cannot be read \(No such file.*needs a folder with ca"):
        check_exposure(AWAY, tmp_path, insecure=False, force=False)


@pytest.mark.parametrize(
    ("file", "what"), [("ca.pem", "certificate"), ("cert.pem", "certificate"), ("key.pem", "private key")]
)
def test_a_file_that_is_no_pem_is_named(tmp_path: Path, file: str, what: str) -> None:
    for name, kind in (("ca.pem", "CERTIFICATE"), ("cert.pem", "CERTIFICATE"), ("key.pem", "PRIVATE KEY")):
        (tmp_path / name).write_text(f"-----BEGIN {kind}-----")
    (tmp_path / file).write_bytes(b"\x00\xff")
    with pytest.raises(ConnectionRefused, match=rf"{file}' holds no PEM {what}"):
        Certificates.read(tmp_path)


@quick
@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 120) | st.just(2**64 - 1), st.integers(1, 8))
def test_chunks_are_the_bytes_of_all_buffers_from_any_offset(parts: list[bytes], offset: int, size: int) -> None:
    whole = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "CHUNK", size)
        found = [wire.Chunk.FromString(chunk(*block)) for block in blocks([memoryview(part) for part in parts], offset)]
    end = offset
    for piece in found:
        end += len(data_of(piece, end, len(whole)))

    assert b"".join(chunk.data for chunk in found) == whole[offset:]
    assert all(len(chunk.data) <= size for chunk in found)


@pytest.mark.parametrize("size", [1, 127, 128, 200, 2**14 - 1, 2**14, 2**21 - 40, 2**21])
@pytest.mark.parametrize("offset", [0, 1, 2**63])
def test_an_upload_request_is_what_protobuf_would_write(size: int, offset: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    chunk = wire.Chunk(offset=offset, data=data, crc32=zlib.crc32(data))
    found = upload_request("session", "nonce", offset, memoryview(data))

    assert wire.UploadRequest.FromString(found) == wire.UploadRequest(session="session", nonce="nonce", chunk=chunk)
    assert len(found) == wire.UploadRequest(session="session", nonce="nonce", chunk=chunk).ByteSize()


@pytest.mark.parametrize(
    ("offset", "data", "crc32", "reason"),
    [
        (4, b"abcd", 0, "begins at byte 4, expected 8"),
        (12, b"abcd", 0, "begins at byte 12, expected 8"),
        (8, b"", 0, "0 bytes at 8 does not fit into 12"),
        (8, b"abcde", 0, "5 bytes at 8 does not fit into 12"),
        (8, b"abcd", 1, "damaged"),
    ],
)
@pytest.mark.fault(20)
def test_a_chunk_that_is_not_the_next_whole_one_is_refused(offset: int, data: bytes, crc32: int, reason: str) -> None:
    chunk = wire.Chunk(offset=offset, data=data, crc32=zlib.crc32(data) ^ crc32)
    with pytest.raises(CodecError, match=reason):
        data_of(chunk, 8, 12)


@quick
@given(st.binary(min_size=1, max_size=64), st.data())
@pytest.mark.fault(20)
def test_any_bit_that_flips_is_found(data: bytes, draw: st.DataObject) -> None:
    damaged = wire.Chunk.FromString(chunk(0, memoryview(data)))
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    damaged.data = bytes(flipped)
    with pytest.raises(CodecError, match="damaged"):
        data_of(damaged, 0, len(data))
