"""Mutual TLS: who has no certificate of the server's CA gets nowhere, and nobody bears another's name."""

from __future__ import annotations

import contextlib
import datetime
import random
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shoal.protos.errors import ConnectionRefused
from shoal.protos.transport import Certificates
from shoal.server.orders import Joined, Refused
from tests.server.asking import an_update, ask, journal_of

if TYPE_CHECKING:
    from tests.server.conftest import Join, Serve

PEM, KEY = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
Issue = Callable[[str], Certificates]


def authority(folder: Path) -> Issue:
    """``issue(name)``: a folder with a certificate of one new CA."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
    now = datetime.datetime.now(datetime.UTC)

    def builder(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    ca = builder(ca_name, ca_key).add_extension(x509.BasicConstraints(True, None), True).sign(ca_key, hashes.SHA256())

    def issue(common_name: str) -> Certificates:
        key, place = ec.generate_private_key(ec.SECP256R1()), folder / common_name
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        cert = builder(name, key).add_extension(names, False).sign(ca_key, hashes.SHA256())
        place.mkdir(parents=True)
        (place / "ca.pem").write_bytes(ca.public_bytes(PEM))
        (place / "cert.pem").write_bytes(cert.public_bytes(PEM))
        (place / "key.pem").write_bytes(key.private_bytes(PEM, KEY, serialization.NoEncryption()))
        return Certificates.read(place)

    return issue


@pytest.fixture
def issue(tmp_path: Path) -> Issue:
    return authority(tmp_path / "ours")


def test_a_certificate_of_the_ca_opens_the_door(serve: Serve, join: Join, issue: Issue) -> None:
    serving = serve("localhost:0", issue("server"))
    join(serving, "a", issue("hospital").for_client()).beat()

    assert serving.call(lambda: serving.hub.known) == {"a": "hospital"}


def test_nobody_else_gets_in(serve: Serve, join: Join, issue: Issue, tmp_path: Path) -> None:
    certificates = issue("server")
    serving = serve("localhost:0", certificates)
    stranger = authority(tmp_path / "theirs")("hospital")
    without = grpc.ssl_channel_credentials(certificates.ca)
    other_ca = grpc.ssl_channel_credentials(certificates.ca, stranger.key, stranger.cert)
    for credentials in (None, without, other_ca, stranger.for_client()):
        peer = join(serving, "a", credentials, welcome=False)
        with pytest.raises(grpc.RpcError) as caught:
            peer.welcome()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    assert serving.call(lambda: serving.hub.known) == {}
    join(serving, "a", issue("hospital").for_client()).beat()


@pytest.mark.fault(15, 19)
def test_who_knocks_in_another_language_disturbs_nobody(serve: Serve, join: Join, issue: Issue) -> None:
    """Plain HTTP, noise, a handshake that stops, another ALPN: no answer, and the door stays open for others."""
    certificates = issue("server")
    serving = serve("localhost:0", certificates)
    place = (serving.address.host, serving.address.port)
    peer = join(serving, "a", issue("hospital").for_client())
    browser = ssl.create_default_context(cadata=certificates.ca.decode())
    browser.load_cert_chain(certificates.folder / "cert.pem", certificates.folder / "key.pem")
    browser.set_alpn_protocols(["http/1.1"])
    with contextlib.ExitStack() as open_:
        plain, noisy, halting, other = (open_.enter_context(socket.create_connection(place, 10)) for _ in range(4))
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        noisy.sendall(random.Random(0).randbytes(4096))
        halting.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        with pytest.raises((ssl.SSLError, ConnectionError)):
            wrapped = open_.enter_context(browser.wrap_socket(other, server_hostname="localhost"))
            wrapped.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not wrapped.recv(100):
                raise ConnectionError("hung up")
        peer.beat()
        join(serving, "b", issue("clinic").for_client()).beat()


def test_a_name_belongs_to_the_certificate_that_first_had_it(serve: Serve, join: Join, issue: Issue) -> None:
    serving = serve("localhost:0", issue("server"))
    first = join(serving, "a", issue("one").for_client())
    thief = join(serving, "a", issue("two").for_client(), welcome=False, instance="two")
    with pytest.raises(grpc.RpcError, match="belongs to the certificate of 'one', not of 'two'; give another name"):
        thief.welcome()

    first.beat()
    joined, refused = (serving.events.get(timeout=10) for _ in range(2))
    assert isinstance(joined, Joined) and joined.identity == "one"
    assert isinstance(refused, Refused) and (refused.client, refused.identity) == ("a", "two")


def test_an_answer_is_kept_with_the_identity_that_was_proven(serve: Serve, join: Join, issue: Issue) -> None:
    serving = serve("localhost:0", issue("server"))
    peer = join(serving, "a", issue("hospital").for_client())
    ask(serving)
    nonce = peer.hear("offer").nonce
    peer.answer(nonce, an_update())
    row = "SELECT identity FROM task WHERE nonce = ?"

    assert journal_of(serving)._database.execute(row, (nonce,)).fetchall() == [("hospital",)]


def test_one_certificate_may_have_several_names(serve: Serve, join: Join, issue: Issue) -> None:
    serving, certificates = serve("localhost:0", issue("server")), issue("one")
    for name in ("a", "b"):
        join(serving, name, certificates.for_client()).beat()

    assert serving.call(lambda: serving.hub.known) == {"a": "one", "b": "one"}


@pytest.mark.parametrize("file", ["cert.pem", "key.pem", "ca.pem"])
def test_a_damaged_certificate_is_one_clear_sentence(issue: Issue, file: str) -> None:
    folder = issue("server").folder
    what = b"PRIVATE KEY" if file == "key.pem" else b"CERTIFICATE"
    (folder / file).write_bytes(b"-----BEGIN %b-----\nbm90aGluZw==\n-----END %b-----\n" % (what, what))
    with pytest.raises(ConnectionRefused, match=r"the certificates in '.*server' cannot be used \(damaged\)"):
        Certificates.read(folder)


def test_a_key_of_another_certificate_is_one_clear_sentence(issue: Issue) -> None:
    one, two = issue("one"), issue("two")
    (one.folder / "key.pem").write_bytes(two.key)
    with pytest.raises(ConnectionRefused, match="key values mismatch"):
        Certificates.read(one.folder)


def test_a_key_with_a_password_asks_nobody_for_it(issue: Issue) -> None:
    one = issue("one")
    key = serialization.load_pem_private_key(one.key, None)
    hidden = key.private_bytes(PEM, KEY, serialization.BestAvailableEncryption(b"secret"))
    (one.folder / "key.pem").write_bytes(hidden)
    with pytest.raises(ConnectionRefused, match="without a password"):
        Certificates.read(one.folder)
