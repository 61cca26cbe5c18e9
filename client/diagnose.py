"""Why a server cannot be reached: gRPC says only that it cannot. Each step is tried by itself."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from shoal.protos.transport import Address

__all__ = ["diagnose"]

PATIENCE = 5.0  # seconds for a step
OTHER_NAMES = (62, 64)  # OpenSSL's numbers for a certificate of another host name, of another IP address


def diagnose(address: Address, tls: Path | None) -> str | None:
    """The step that fails, its cause and what to do; None if the server can be reached now."""
    try:
        socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name that a host can have"
        return f"there is no host {address.host!r} (looking up its name: {reason}); correct the address"
    try:
        connection = socket.create_connection((address.host, address.port), PATIENCE)
    except OSError as error:
        return (
            f"nothing answers at {address} (TCP: {error.strerror or error}); start the server there, or correct "
            f"the address or the firewall"
        )
    with connection:
        return _plain(connection, address) if tls is None else _secure(connection, address, tls)


def _secure(connection: socket.socket, address: Address, folder: Path) -> str | None:
    try:
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem", password=lambda: b"")  # or it would ask
        context.set_alpn_protocols(["h2"])
    except OSError as error:  # they were whole when this process started
        return f"the certificates in {str(folder)!r} cannot be used ({error.strerror or error}); put them back"
    try:
        with context.wrap_socket(connection, server_hostname=address.host) as secure:
            return _heard(secure, address)
    except ssl.SSLCertVerificationError as error:
        remedy = "renew it, or correct ca.pem"
        if error.verify_code in OTHER_NAMES:
            remedy = "dial a name that stands in it, or renew it for this one"
        return f"the server's certificate is not accepted (TLS: {error.verify_message.rstrip('.')}); {remedy}"
    except (TimeoutError, ssl.SSLEOFError, ConnectionError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else "it hung up"
        return (
            f"what answers at {address} gave no certificate (TLS: {reason}); correct the address, or see the server's "
            f"log"
        )
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if any(words in reason for words in ("wrong version number", "record layer failure", "packet length")):
            return f"the server at {address} speaks no TLS ({reason}); start it with --tls, or use --insecure here"
        return f"the server does not accept this client's certificate (TLS: {reason}); renew cert.pem, or its CA there"


def _heard(secure: ssl.SSLSocket, address: Address) -> str | None:
    """Under TLS 1.3 the server judges our certificate only now; then it speaks first, as gRPC does."""
    try:
        heard = secure.recv(1)
    except TimeoutError:  # without ALPN it waits for us
        return f"what answers at {address} speaks TLS, but no gRPC; correct the address"
    except ConnectionError:
        heard = b""
    if heard:
        return None
    return (
        f"the server at {address} hung up when it had seen this client's certificate; renew cert.pem, or its CA there"
    )


def _plain(connection: socket.socket, address: Address) -> str | None:
    """A gRPC server speaks first: its HTTP/2 settings."""
    connection.settimeout(PATIENCE)
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        answer = connection.recv(9)
    except OSError:
        answer = b""
    if len(answer) >= 4 and answer[3] == 4:  # a SETTINGS frame
        return None
    return f"what answers at {address} speaks no plain gRPC; give --tls DIR if it uses TLS, or correct the address"
