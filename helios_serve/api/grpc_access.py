"""Who calls over gRPC, and what the metadata of a call says. Translates to `auth` and `limits`, and decides nothing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from helios_serve.api.auth import Authenticator, Caller, grpc_peer_host, require
from helios_serve.api.keys import Scope
from helios_serve.api.limits import Limiter
from helios_serve.errors import InvalidRequestError
from helios_serve.tracing import TraceContext, context_from

MAX_KEY_CHARS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHeaders:
    """What a call's metadata says. request_id: the caller's, or a new one. trace: the caller's place in a trace, if it
    names a valid one."""

    request_id: str
    authorization: str | None
    idempotency_key: str | None
    trace: TraceContext | None

    def checked_key(self) -> str | None:
        """The idempotency key. Raises InvalidRequestError for one of no or too many characters."""
        key = self.idempotency_key
        if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
            message = f"idempotency-key: must have 1 to {MAX_KEY_CHARS} characters"
            raise InvalidRequestError(message, param="idempotency-key")
        return key


def read_headers(metadata: Iterable[tuple[str, str | bytes]]) -> CallHeaders:
    """The first value of each name counts."""
    found: dict[str, str] = {}
    for name, value in metadata:
        if isinstance(value, str):
            found.setdefault(name, value)
    return CallHeaders(
        request_id=_request_id(found.get("x-request-id")),
        authorization=found.get("authorization"),
        idempotency_key=found.get("idempotency-key"),
        trace=context_from(found),
    )


class GrpcAccess:
    """One for each process. `now`: seconds of the Unix clock."""

    def __init__(self, authenticator: Authenticator, limiter: Limiter, *, now: Callable[[], float] = time.time) -> None:
        self._authenticator = authenticator
        self._limiter = limiter
        self._now = now

    async def caller(self, headers: CallHeaders, peer: str, scope: Scope) -> Caller:
        """The caller by the metadata `authorization`; counts one request of its tenant.

        Args:
            peer: as gRPC writes it, `ipv4:1.2.3.4:5`.

        Raises: AuthenticationError, ScopeError, ThrottledError, RateLimitError.
        """
        caller = await self._authenticator.authenticate(headers.authorization, grpc_peer_host(peer), self._now())
        require(caller, scope)
        self._limiter.admit_request(caller)
        return caller


def _request_id(given: str | None) -> str:
    """The caller's id if it is 1 to 128 printable ASCII characters, else a new one."""
    if given is not None and 1 <= len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"req_{uuid.uuid4().hex}"
