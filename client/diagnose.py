"""Why a server cannot be reached: gRPC says only that it cannot. Each step is tried by itself."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from shoal.protos.transport import Address

__all__ = ["diagnose"]

PATIENCE = 5.0  # seconds for a step


def diagnose(address: Address, tls: Path | None) -> str | None:
    """The step that fails, its cause and what to do; None if the server can be reached now."""
    try:
        socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"there is no host {address.host!r} (looking up its name: {error.strerror}); correct --connect"
    try:
        connection = socket.create_connection((address.host, address.port), PATIENCE)
    except OSError as error:
        return (
            f"nothing answers at {address} (TCP: {error.strerror or error}); start 'shoal server' there, or correct "
            f"--connect or the firewall"
        )
    with connection:
        return _plain(connection, address) if tls is None else _secure(connection, address, tls)


def _secure(connection: socket.socket, address: Address, folder: Path) -> str | None:
    try:
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(connection, server_hostname=address.host) as secure:
            secure.settimeout(PATIENCE)
            secure.recv(1)  # under TLS 1.3 the server judges our certificate only now
    except ssl.SSLCertVerificationError as error:
        return f"the server's certificate is not accepted (TLS: {error.verify_message}); renew it, or correct ca.pem"
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if "wrong version number" in reason or "record layer failure" in reason:
            return f"the server at {address} speaks no TLS ({reason}); start it with --tls, or use --insecure here"
        return f"the server does not accept this client's certificate (TLS: {reason}); renew cert.pem, or its CA there"
    except TimeoutError:
        return None  # it took the certificate and waits for us to speak
    except OSError as error:
        return f"the connection to {address} broke off (TLS: {error.strerror or error}); look at the server's log"
    return None


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
    return f"what answers at {address} speaks no plain gRPC; give --tls DIR if it uses TLS, or correct --connect"
