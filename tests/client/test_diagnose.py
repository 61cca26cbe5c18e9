"""Why a server cannot be reached: each step that can fail is named, with what to do about it."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shoal.client import diagnose as module
from shoal.client.diagnose import diagnose
from shoal.protos.transport import Address, Certificates
from shoal.server.serving import Serving

PEM, KEY = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
Open = Callable[..., Address]


class Authority:
    """A CA that writes folders as ``--tls`` takes them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name, self._key = (
            folder,
            f"the CA of {folder.name}",
            ec.generate_private_key(ec.SECP256R1()),
        )
        ca = self._builder(self._key, 1, self._name).add_extension(x509.BasicConstraints(True, None), True)
        self.pem = ca.sign(self._key, hashes.SHA256()).public_bytes(PEM)

    def _builder(self, key: ec.EllipticCurvePrivateKey, days: int, name: str) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, self._name))
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(9)).not_valid_after(now + datetime.timedelta(days))

    def issue(self, name: str, days: int = 1, host: x509.GeneralName = LOOPBACK, trusts: bytes | None = None) -> Path:
        """``days`` are those that it is still valid, ``trusts`` another CA."""
        key, folder = ec.generate_private_key(ec.SECP256R1()), self._folder / name
        hosts = x509.SubjectAlternativeName([host])
        cert = self._builder(key, days, name).add_extension(hosts, False).sign(self._key, hashes.SHA256())
        folder.mkdir(parents=True)
        (folder / "ca.pem").write_bytes(trusts or self.pem)
        (folder / "cert.pem").write_bytes(cert.public_bytes(PEM))
        (folder / "key.pem").write_bytes(key.private_bytes(PEM, KEY, serialization.NoEncryption()))
        return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def client(ours: Authority) -> Path:
    return ours.issue("client")


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Open]:
    """``serving(folder)``: where a server with these certificates listens; None: in plain text."""
    open_ = list[Serving]()

    def start(folder: Path | None) -> Address:
        certificates = None if folder is None else Certificates.read(folder)
        open_.append(Serving(Address("127.0.0.1", 0), certificates))
        return open_[-1].address

    yield start
    for server in open_:
        server.close()


@pytest.fixture
def answering() -> Iterator[Open]:
    """``answering(function)``: where a program listens that does this with a connection, and then hangs up."""
    doors, threads = list[socket.socket](), list[threading.Thread]()

    def start(answer: Callable[[socket.socket], object]) -> Address:
        door = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            connection, _ = door.accept()
            with connection:
                answer(connection)

        doors.append(door)
        threads.append(threading.Thread(target=accept))
        threads[-1].start()
        return Address("127.0.0.1", door.getsockname()[1])

    yield start
    for thread, door in zip(threads, doors, strict=True):
        thread.join(10)
        door.close()


def nowhere() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return Address("127.0.0.1", door.getsockname()[1])


def said(address: Address, tls: Path | None) -> str:
    sentence = diagnose(address, tls)
    assert sentence is not None
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70 + ".invalid"])
def test_a_name_that_is_no_host(host: str) -> None:
    assert said(Address(host, 80), None).startswith(f"there is no host {host!r} (looking up its name: ")


@pytest.mark.parametrize("tls", [True, False])
def test_nobody_listens(client: Path, tls: bool) -> None:
    address = nowhere()

    assert said(address, client if tls else None) == (
        f"nothing answers at {address} (TCP: Connection refused); start the server there, or correct the "
        f"address or the firewall"
    )


@pytest.mark.parametrize("tls", [True, False])
def test_a_server_that_can_be_reached(serving: Open, ours: Authority, client: Path, tls: bool) -> None:
    server = ours.issue("well") if tls else None

    assert diagnose(serving(server), client if tls else None) is None


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_a_server_of_an_unknown_authority(serving: Open, theirs: Authority, client: Path) -> None:
    words = said(serving(theirs.issue("server")), client)

    assert words.startswith("the server's certificate is not accepted (TLS: unable to get local issuer certificate")
    assert words.endswith("; renew it, or correct ca.pem")


def test_nothing_is_said_beside_the_sentence(serving: Open, theirs: Authority, client: Path, tmp_path: Path) -> None:
    """gRPC would write of each handshake that fails; it is silent only if that is said before it is imported."""
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1), np.float32), y=np.zeros(2, np.int64))
    words = ["client", "--connect", serving(theirs.issue("noisy")), "--tls", client, "--data", tmp_path / "a.npz"]
    command = [sys.executable, "-m", "shoal", *words, "--state", tmp_path / "state", "--patience", "0.5"]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}

    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr.startswith("shoal: the server's certificate is not accepted") and done.stderr.count("\n") == 1


def test_a_server_whose_certificate_has_expired(serving: Open, ours: Authority, client: Path) -> None:
    words = said(serving(ours.issue("old server", days=-1)), client)

    assert words == (
        "the server's certificate is not accepted (TLS: certificate has expired); renew it, or correct ca.pem"
    )


@pytest.mark.parametrize("host", [x509.DNSName("fl.example.org"), x509.IPAddress(ipaddress.ip_address("10.0.0.1"))])
def test_a_server_of_another_name(serving: Open, ours: Authority, client: Path, host: x509.GeneralName) -> None:
    words = said(serving(ours.issue(f"server {host.value}", host=host)), client)

    assert "certificate is not valid for '127.0.0.1'); dial a name that stands in it" in words


def test_a_client_whose_authority_the_server_does_not_know(serving: Open, ours: Authority, theirs: Authority) -> None:
    stranger = theirs.issue("stranger", trusts=ours.pem)

    assert "this client's certificate" in said(serving(ours.issue("strict")), stranger)


def test_a_client_whose_certificate_has_expired(serving: Open, ours: Authority) -> None:
    words = said(serving(ours.issue("wary")), ours.issue("old client", days=-1))

    assert "this client's certificate" in words
    assert words.endswith("; renew cert.pem, or its CA there")


def test_certificates_that_are_gone(serving: Open, ours: Authority, tmp_path: Path) -> None:
    words = said(serving(ours.issue("ready")), tmp_path / "moved")

    assert words.endswith("cannot be used (No such file or directory); put them back")


@pytest.mark.timeout(20)
def test_a_key_with_a_password_is_not_asked_for_at_the_terminal(serving: Open, ours: Authority) -> None:
    folder = ours.issue("locked")
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    (folder / "key.pem").write_bytes(key.private_bytes(PEM, KEY, locked))

    assert "cannot be used" in said(serving(ours.issue("open")), folder)


# --- somebody else answers -------------------------------------------------------------------------------------------


def test_a_server_in_plain_text_where_tls_is_wanted(serving: Open, client: Path) -> None:
    address = serving(None)

    assert said(address, client).startswith(f"the server at {address} speaks no TLS (")


def test_a_server_with_tls_where_plain_text_is_wanted(serving: Open, ours: Authority) -> None:
    address = serving(ours.issue("hidden"))

    assert said(address, None) == (
        f"what answers at {address} speaks no plain gRPC; give --tls DIR if it uses TLS, or correct the address"
    )


@pytest.fixture
def website(request: pytest.FixtureRequest, ours: Authority) -> Iterator[Address]:
    """A web server; with parameter True behind TLS."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    server.daemon_threads = False
    if request.param:
        folder = ours.issue("website")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Address("127.0.0.1", server.server_port)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("website", [False], indirect=True)
def test_a_website(website: Address, client: Path) -> None:
    assert "speaks no plain gRPC" in said(website, None)
    assert "speaks no TLS" in said(website, client)


@pytest.mark.parametrize("website", [True], indirect=True)
def test_a_website_with_tls(website: Address, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)

    assert said(website, client) == f"what answers at {website} speaks TLS, but no gRPC; correct the address"


@pytest.mark.parametrize("tls", [True, False])
def test_somebody_who_takes_the_call_and_says_nothing(
    answering: Open, client: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    done = threading.Event()
    address = answering(lambda connection: done.wait(10))
    words = said(address, client if tls else None)
    done.set()

    assert ("gave no certificate (TLS: no answer)" if tls else "speaks no plain gRPC") in words


@pytest.mark.parametrize("tls", [True, False])
def test_somebody_who_hangs_up_at_once(answering: Open, client: Path, tls: bool) -> None:
    words = said(answering(lambda connection: None), client if tls else None)

    assert ("gave no certificate (TLS: it hung up)" if tls else "speaks no plain gRPC") in words
