"""Who calls, and what for: bearer keys, scopes, the throttle against guessing, and the origins of web pages.

Framework-free: HTTP and gRPC give it the header and the address and get a `Caller` or an error. Knows nothing of jobs.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import unquote

from helios_serve.api.keys import DEFAULT_TENANT, SCOPES, Key, KeyLimits, KeySource, Scope, split_key
from helios_serve.errors import HeliosError

MAX_FAILURES = 10
FAILURE_WINDOW_S = 60.0
THROTTLE_S = 60.0
UNIX_PEER = "unix"
_NO_SECRET = "0" * 64
_NO_HASH = "0" * 64
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +(\S+) *")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ORIGIN = re.compile(r"(https?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")

EXPOSED_HEADERS = (
    "x-request-id",
    "x-video-id",
    "openai-poll-after-ms",
    "retry-after",
    "location",
    "content-range",
    "etag",
    "x-ratelimit-limit-frames",
    "x-ratelimit-remaining-frames",
    "x-ratelimit-reset-frames",
)
"""What a page of a listed origin may read of an answer."""


class AccessError(HeliosError):
    """Base of refusals of a caller; `headers` go on the HTTP answer."""

    retryable = False

    @property
    def headers(self) -> Mapping[str, str]:
        return {}


class AuthenticationError(AccessError):
    """No valid key or token (HTTP 401)."""

    status, grpc_status, code = 401, "UNAUTHENTICATED", "invalid_api_key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": "Bearer"}


class ThrottledError(AccessError):
    """Too many failures from one address (HTTP 429)."""

    status, grpc_status, code, retryable = 429, "RESOURCE_EXHAUSTED", "auth_throttled", True


class ScopeError(AccessError):
    """The key is valid and not for this (HTTP 403)."""

    status, grpc_status, code = 403, "PERMISSION_DENIED", "insufficient_scope"


class OriginError(AccessError):
    """A web page of a foreign origin calls (HTTP 403)."""

    status, grpc_status, code = 403, "PERMISSION_DENIED", "origin_not_allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls. `tenant` owns what the caller makes. Without keys there is one anonymous caller: no `key_id`, and no
    limits but the server's."""

    tenant: str
    key_id: str | None
    scopes: frozenset[Scope]
    limits: KeyLimits | None
    weight: float = 1.0

    @property
    def is_anonymous(self) -> bool:
        return self.key_id is None


ANONYMOUS = Caller(tenant=DEFAULT_TENANT, key_id=None, scopes=frozenset(SCOPES) - {"admin"}, limits=None)


def require(caller: Caller, scope: Scope) -> None:
    """Raises ScopeError when the caller's key does not have `scope`."""
    if scope not in caller.scopes:
        have = ", ".join(each for each in SCOPES if each in caller.scopes) or "none"
        raise ScopeError(f"scope {scope} is needed; this key has: {have}")


class FailureThrottle:
    """Ten failures within a minute from one address close it for a minute, also to valid keys: otherwise guessing could
    go on and would show when it succeeds.

    An IPv6 address counts as its /64, which one host can use up alone. At most `max_addresses` are remembered; the one
    whose last failure is the oldest goes first. `clock` counts seconds and is not moved by the wall clock.
    """

    def __init__(self, *, max_addresses: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_addresses = max_addresses
        self._clock = clock
        self._table: OrderedDict[str, deque[float]] = OrderedDict()  # times of the last failures, the oldest first

    def __len__(self) -> int:
        return len(self._table)

    def check(self, peer: str | None) -> None:
        """Raises ThrottledError while the address is closed."""
        failures = self._table.get(_network_of(peer))
        if failures is None or len(failures) < MAX_FAILURES or failures[-1] - failures[0] >= FAILURE_WINDOW_S:
            return
        left_s = failures[-1] + THROTTLE_S - self._clock()
        if left_s > 0:
            raise ThrottledError(
                f"{MAX_FAILURES} failures to authenticate within a minute from this address, as many as are allowed; "
                f"try again in {math.ceil(left_s)} s",
                retry_after_s=left_s,
            )
        del self._table[_network_of(peer)]

    def note_failure(self, peer: str | None) -> None:
        network = _network_of(peer)
        failures = self._table.setdefault(network, deque(maxlen=MAX_FAILURES))
        failures.append(self._clock())
        self._table.move_to_end(network)
        if len(self._table) > self._max_addresses:
            self._table.popitem(last=False)


class Authenticator:
    """Finds the caller of a request. Without `sources` the server has no keys: everybody on this machine is the
    anonymous caller, and everybody else is refused. Runs on the event loop."""

    def __init__(self, sources: Sequence[KeySource], throttle: FailureThrottle | None = None) -> None:
        self._sources = tuple(sources)
        self._throttle = FailureThrottle() if throttle is None else throttle

    @property
    def is_keyless(self) -> bool:
        return not self._sources

    async def authenticate(self, authorization: str | None, peer: str | None, now: float) -> Caller:
        """The caller of a request with this `Authorization` header.

        Args:
            peer: the client's address, without port.
            now: seconds of the Unix clock; keys expire by it.

        Raises:
            AuthenticationError: no key, or none that is valid. What is wrong with it is not said, and costs the same.
            ThrottledError: ten failures from this address within a minute.
        """
        if self.is_keyless:
            return _local_caller(peer)
        self._throttle.check(peer)
        if authorization is None:
            raise AuthenticationError("no API key was sent; send the header Authorization: Bearer hs_<id>_<secret>")
        key = await self._key_of(authorization)
        if key is None:
            self._throttle.note_failure(peer)
            raise AuthenticationError(
                "the API key is not valid; the header reads Authorization: Bearer hs_<id>_<secret>"
            )
        return _caller_of(key, now)

    async def caller_by_id(self, key_id: str | None, peer: str | None, now: float) -> Caller:
        """The caller for whom a token was signed, by the id of its key; None is the anonymous one.

        Raises: AuthenticationError when the key has been revoked, or has expired, since.
        """
        if self.is_keyless and key_id is None:
            return _local_caller(peer)
        key = None if key_id is None else await self._find(key_id)
        if key is None:
            raise AuthenticationError("the token is not valid here, or has expired")
        return _caller_of(key, now)

    def check_throttle(self, peer: str | None) -> None:
        """Before a token is looked at. Raises ThrottledError."""
        self._throttle.check(peer)

    def note_failure(self, peer: str | None) -> None:
        """After a token was refused: guessing tokens is throttled like guessing keys."""
        self._throttle.note_failure(peer)

    async def _key_of(self, authorization: str) -> Key | None:
        """One hash and one comparison whatever the header holds: the time it takes does not tell what was wrong."""
        bearer = _BEARER.fullmatch(authorization)
        parts = None if bearer is None else split_key(bearer[1])
        key_id, secret = ("", _NO_SECRET) if parts is None else parts
        key = await self._find(key_id)
        expected = _NO_HASH if key is None else key.secret_sha256
        is_right = hmac.compare_digest(hashlib.sha256(secret.encode()).hexdigest(), expected)
        return key if is_right else None

    async def _find(self, key_id: str) -> Key | None:
        for source in self._sources:
            key = await source.find(key_id)
            if key is not None:
                return key
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginPolicy:
    """Web pages that may call: `allowed` are origins such as https://app.example; no wildcard, because answers carry
    what a key may see.

    Raises: ValueError when an entry is no origin.
    """

    is_keyless: bool
    allowed: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        normal = set()
        for entry in self.allowed:
            origin = _normal_origin(entry)
            if origin is None:
                raise ValueError(f"CORS origin {entry!r}: must read https://host or https://host:port, without a path")
            normal.add(origin)
        object.__setattr__(self, "allowed", frozenset(normal))


def check_origin(
    origin: str | None, own_origin: str, policy: OriginPolicy, *, is_websocket: bool = False
) -> str | None:
    """What to answer as `access-control-allow-origin`: the caller's origin if it is listed, None for no such header.

    A server without keys answers no page but its own and the listed ones, because a page can post a form to localhost
    without asking first. Its own page is one under a loopback name: behind any other name may be a stranger's, whose
    DNS points here. Browsers do not guard WebSockets, so these are checked with keys too.

    Args:
        origin: the `Origin` header; None when the caller is no web page.
        own_origin: scheme and `Host` of the request, `http://127.0.0.1:8000`.

    Raises:
        OriginError: a foreign page calls.
    """
    if origin is None:
        return None
    normal = _normal_origin(origin)
    if normal is not None and normal in policy.allowed:
        return origin
    is_own = normal is not None and normal == _normal_origin(own_origin)
    if policy.is_keyless:
        is_own = is_own and is_loopback(_host_of(own_origin))
    if is_own or not (policy.is_keyless or is_websocket):
        return None
    raise OriginError(
        f"origin {origin[:128]}: pages from there may not call this server; --cors-origin, given to the server, lists "
        "those that may"
    )


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine."""
    if host is None:
        return False
    address = _address_of(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def grpc_peer_host(peer: str) -> str:
    """The address in gRPC's `context.peer()`, which reads `ipv4:1.2.3.4:5`, `ipv6:%5B::1%5D:5` or `unix:PATH`; for the
    latter UNIX_PEER, which counts as this machine."""
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return UNIX_PEER
    return rest.rpartition(":")[0].strip("[]")


def _local_caller(peer: str | None) -> Caller:
    if peer == UNIX_PEER or is_loopback(peer):
        return ANONYMOUS
    raise AuthenticationError("this server has no API keys and answers callers on its own machine only")


def _caller_of(key: Key, now: float) -> Caller:
    if key.is_expired(now):
        raise AuthenticationError(f"key {key.id}: expired; ask the operator of this server for a new one")
    return Caller(tenant=key.tenant, key_id=key.id, scopes=key.scopes, limits=key.limits, weight=key.weight)


def _address_of(host: str) -> IPv4Address | IPv6Address | None:
    """IPv4 addresses written as IPv6 are IPv4; a zone such as %eth0 is dropped."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def _network_of(peer: str | None) -> str:
    """What failures are counted for: an IPv4 address, or the /64 of an IPv6 one."""
    address = _address_of(peer or "")
    if isinstance(address, IPv6Address):
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return (peer or "unknown")[:64] if address is None else str(address)


def _host_of(origin: str) -> str | None:
    match = _ORIGIN.fullmatch(origin)
    return None if match is None else match[2].strip("[]")


def _normal_origin(text: str) -> str | None:
    """Lower case, without the scheme's own port; None when it is no http origin (`null` is none)."""
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return None
    scheme, host, port = match[1], match[2].lower(), match[3]
    if port is None or int(port) == _DEFAULT_PORTS[scheme]:
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{int(port)}"
