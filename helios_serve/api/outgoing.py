"""Requests that the server makes to addresses which strangers name: webhooks and media.

A name is resolved once, every address that it has must be a public one, and the connection goes to an address that was
checked: a name that changes its meaning in between changes nothing. No proxy, cookie or encoding takes part. Knows
nothing of jobs.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

import httpx2

from helios_serve.errors import HeliosError

Reason = Literal["forbidden", "failed"]
Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host, for a port. Raises OSError when there are none."""

MAX_REDIRECTS = 3
CONNECT_S = 5.0
MAX_URL = 2048  # characters
_HTTPS_PORT = 443
_PORTS = {"https": _HTTPS_PORT, "http": 80}
_USER_AGENT = "helios-serve"
_HOST = re.compile(r"[a-z0-9._-]{1,253}|[0-9a-f:.]{2,45}")
_NO_REUSE = httpx2.Limits(max_connections=1, max_keepalive_connections=0)

_PUBLIC_V6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = (
    ip_network("192.88.99.0/24"),  # relays of 6to4
    ip_network("168.63.129.16/32"),  # Azure's host, reachable from inside only
    ip_network("2001::/23"),  # protocol assignments, Teredo among them
    ip_network("3fff::/20"),  # documentation
)
"""What is not public beside what the standard library knows."""


class OutgoingError(HeliosError):
    """An address that the server may not ask (`forbidden`), or that gave no usable answer (`failed`) (HTTP 400)."""

    status, grpc_status, retryable = 400, "INVALID_ARGUMENT", False

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message, code="media_url_forbidden" if reason == "forbidden" else "media_fetch_failed")
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingPolicy:
    """allowed_hosts: the only hosts that may be asked, `.example.com` for all below example.com; None for any.
    allow_private: also addresses that are not public, there with plain http and any port; for receivers in the
    operator's own network."""

    allowed_hosts: frozenset[str] | None = None
    allow_private: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    status: int
    location: str | None
    body: bytes


async def system_resolve(host: str, port: int) -> Sequence[str]:
    """The system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Outgoing:
    """One for each process and policy; keeps no connection.

    Args:
        resolve: asked once for each request and each redirect.
        tls: verifies receivers; None for the certificates that the system trusts.
    """

    def __init__(
        self,
        policy: OutgoingPolicy | None = None,
        *,
        resolve: Resolve = system_resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = OutgoingPolicy() if policy is None else policy
        self._resolve = resolve
        self._tls = httpx2.create_ssl_context(trust_env=False) if tls is None else tls

    def check(self, url: str) -> None:
        """What can be said of an address without resolving it. Raises OutgoingError `forbidden`."""
        self._target(url)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 10.0) -> int:
        """The status of the answer, redirects included; its body is not read.

        Args:
            timeout_s: for all of it, from resolving on.

        Raises: OutgoingError.
        """
        async with _time_limit(url, timeout_s):
            target = self._target(url)
            answer = await self._send(target, "POST", headers, body, max_bytes=0)
        return answer.status

    async def get(self, url: str, max_bytes: int, *, timeout_s: float = 20.0, max_redirects: int = 0) -> bytes:
        """The body of a 200.

        Args:
            max_bytes: counted while reading.
            timeout_s: for all of it, from resolving on.
            max_redirects: at most `MAX_REDIRECTS`; each place is checked like the first.

        Raises: OutgoingError.
        """
        assert 0 <= max_redirects <= MAX_REDIRECTS
        async with _time_limit(url, timeout_s):
            for _ in range(1 + max_redirects):
                target = self._target(url)
                answer = await self._send(target, "GET", {}, None, max_bytes=max_bytes)
                if answer.status == 200:
                    return answer.body
                if answer.location is None:
                    raise OutgoingError(f"{_shown(url)}: answered with status {answer.status}, not 200", "failed")
                url = _joined(target, answer.location)
        redirects = "redirects are not followed" if max_redirects == 0 else f"more than {max_redirects} redirects"
        raise OutgoingError(f"{_shown(url)}: {redirects}; give the address of the file itself", "failed")

    def _target(self, url: str) -> httpx2.URL:
        """Raises OutgoingError `forbidden` unless the address is one that may be resolved."""
        if len(url) > MAX_URL:
            raise OutgoingError(f"{_shown(url)}: longer than {MAX_URL} characters", "forbidden")
        try:
            target = httpx2.URL(url)
        except (httpx2.InvalidURL, ValueError) as error:
            raise OutgoingError(f"{_shown(url)}: not an address: {error}", "forbidden") from None
        is_http = target.scheme == "https" or (target.scheme == "http" and self._policy.allow_private)
        if not is_http or _HOST.fullmatch(_host(target)) is None:
            raise OutgoingError(f"{_shown(url)}: must read https://host/path; nothing else is asked", "forbidden")
        if target.userinfo:
            raise OutgoingError(f"{_shown(url)}: an address with a user name or password is not asked", "forbidden")
        host = _host(target)
        allowed = self._policy.allowed_hosts
        if allowed is not None and not any(host == one or (one[0] == "." and host.endswith(one)) for one in allowed):
            raise OutgoingError(f"{host}: not among the hosts that this server may ask", "forbidden")
        literal = _literal(host)
        if literal is not None:
            self._check_address(target, literal)
        elif not self._policy.allow_private:
            _check_port(target)
        return target

    def _check_address(self, target: httpx2.URL, address: Address) -> None:
        if is_public(address):
            _check_port(target)
        elif not self._policy.allow_private:
            raise OutgoingError(f"{_host(target)}: has an address that is not public, which is not asked", "forbidden")

    async def _addresses(self, target: httpx2.URL) -> list[Address]:
        """All addresses of the host, each of them allowed."""
        host = _host(target)
        literal = _literal(host)
        if literal is not None:
            return [literal]
        try:
            found = [ip_address(one.partition("%")[0]) for one in await self._resolve(host, _port(target))]
        except (OSError, ValueError):
            found = []
        if not found:
            raise OutgoingError(f"{host}: has no address", "failed")
        for address in found:
            self._check_address(target, address)
        return found

    async def _send(
        self, target: httpx2.URL, method: str, headers: Mapping[str, str], body: bytes | None, *, max_bytes: int
    ) -> _Answer:
        """Tries the addresses in turn until one takes the connection."""
        for address in await self._addresses(target):
            request = _request(target, address, method, headers, body)
            # A client for each request: a connection may only be used for the name that its certificate was checked by.
            transport = httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=_NO_REUSE)
            try:
                async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
                    response = await client.send(request, stream=True, follow_redirects=False)
                    try:
                        return await _read(response, target, max_bytes)
                    finally:
                        await response.aclose()
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise OutgoingError(f"{_host(target)}: no answer ({type(error).__name__})", "failed") from error
        raise OutgoingError(f"{_host(target)}: takes no connection, or its certificate is not valid", "failed")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and to one host there. IPv4 addresses inside IPv6 ones
    (mapped, 6to4, NAT64) are judged as IPv4."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _PUBLIC_V6:
            return False
    if any(address.version == network.version and address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


@asynccontextmanager
async def _time_limit(url: str, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise OutgoingError(f"{_shown(url)}: no full answer within {seconds:g} s", "failed") from None


def _request(
    target: httpx2.URL, address: Address, method: str, headers: Mapping[str, str], body: bytes | None
) -> httpx2.Request:
    """To the address, in the name of the host."""
    own = {
        "host": target.netloc.decode("ascii"),
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": _USER_AGENT,
        "connection": "close",
    }
    extensions = {
        "sni_hostname": _host(target),
        "timeout": {"connect": CONNECT_S, "read": None, "write": None, "pool": None},
    }
    url = target.copy_with(host=str(address), fragment=None)
    return httpx2.Request(method, url, headers={**headers, **own}, content=body, extensions=extensions)


async def _read(response: httpx2.Response, target: httpx2.URL, max_bytes: int) -> _Answer:
    location = response.headers.get("location") if 300 <= response.status_code < 400 else None
    if response.status_code != 200 or max_bytes == 0:
        return _Answer(status=response.status_code, location=location, body=b"")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise OutgoingError(f"{_host(target)}: sends an encoding that was not asked for", "failed")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise OutgoingError(f"{_host(target)}: sends more than {max_bytes} bytes, as many as are taken", "failed")
    return _Answer(status=200, location=None, body=bytes(body))


def _joined(target: httpx2.URL, location: str) -> str:
    try:
        return str(target.join(location))
    except (httpx2.InvalidURL, ValueError):
        raise OutgoingError(f"{_host(target)}: redirects to what is no address", "failed") from None


def _host(target: httpx2.URL) -> str:
    """In ASCII and lower case, an IPv6 address without its brackets."""
    return target.raw_host.decode("ascii").lower().strip("[]").rstrip(".")


def _port(target: httpx2.URL) -> int:
    return _PORTS[target.scheme] if target.port is None else target.port


def _check_port(target: httpx2.URL) -> None:
    if target.scheme != "https" or _port(target) != _HTTPS_PORT:
        raise OutgoingError(f"{_host(target)}: asked by https on port {_HTTPS_PORT} only", "forbidden")


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _shown(url: str) -> str:
    """An address as a message or a log may show it: without what follows the host, which may hold secrets."""
    match = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:(//[^/?#@\s]{1,100}(?=[/?#]|$))?", url)
    return "the address" if match is None else match[0]
