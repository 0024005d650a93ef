"""The addresses that a server listens on, taken before the checkpoint is loaded, and its TLS files, read as early:
whoever starts it learns at once what cannot be had. Knows sockets and PEM files; knows no protocol.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from helios_serve.config import ServerConfig
from helios_serve.errors import HeliosError


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Sockets that are bound and do not listen yet.

    grpc: holds the port of gRPC, which opens a socket of its own beside it; None without gRPC. admin: of the open
    routes; None where they are at `http`. scheme: of `http`.
    """

    http: socket.socket
    grpc: socket.socket | None
    admin: socket.socket | None
    scheme: str

    @property
    def url(self) -> str:
        """Where HTTP is, as a client of this machine writes it."""
        return f"{self.scheme}://{shown_address(self.http)}"

    @property
    def grpc_port(self) -> int:
        assert self.grpc is not None
        port: int = self.grpc.getsockname()[1]
        return port


@contextmanager
def bound(server: ServerConfig) -> Iterator[Listeners]:
    """Takes all addresses; gives back what is still held.

    Raises: HeliosError for an address that cannot be had, or a TLS file that cannot be used.
    """
    _check_tls(server)
    with ExitStack() as held:
        http = held.enter_context(_bind(server.host, server.port, "listen", "choose another --port"))
        grpc = admin = None
        if server.grpc_port is not None:
            grpc = held.enter_context(_bind(server.host, server.grpc_port, "serve gRPC", "choose another --grpc-port"))
        if server.admin_bind is not None:
            host, port = server.admin_address
            admin = held.enter_context(_bind(host, port, "listen", "choose another --admin-bind"))
        yield Listeners(http=http, grpc=grpc, admin=admin, scheme="http" if server.tls_cert is None else "https")


def shown_address(listener: socket.socket) -> str:
    """`host:port` as addresses have it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(host: str, port: int, purpose: str, advice: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise HeliosError(f"cannot {purpose} on {at}: {error.strerror}; {advice}") from error
    return listener


def _check_tls(server: ServerConfig) -> None:
    """Reads the files as HTTP and gRPC will."""
    if server.tls_cert is None:
        return
    assert server.tls_key is not None
    for path in (server.tls_cert, server.tls_key, server.tls_client_ca):
        if path is not None:
            _check_readable(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(server.tls_cert, server.tls_key, password=_refuse_passphrase)
    except (ssl.SSLError, ValueError) as error:
        raise HeliosError(
            f"tls_cert {server.tls_cert}, tls_key {server.tls_key}: {_reason(error)}; give PEM files of a certificate "
            "and its key without a passphrase"
        ) from error
    if server.tls_client_ca is not None:
        try:
            context.load_verify_locations(server.tls_client_ca)
        except ssl.SSLError as error:
            raise HeliosError(
                f"tls_client_ca {server.tls_client_ca}: {_reason(error)}; give a PEM file of certificates"
            ) from error


def _check_readable(path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise HeliosError(f"TLS file {path}: {error.strerror}") from error


def _refuse_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _reason(error: ssl.SSLError | ValueError) -> str:
    return (error.reason or "no PEM file") if isinstance(error, ssl.SSLError) else str(error)
