"""Who calls over HTTP: the bearer header, the tokens in addresses, and the origins of pages. Translates requests to
`auth`, `signed_urls` and `limits`, and decides nothing of its own but whose video a token shows.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from helios_serve.api.auth import (
    UNIX_PEER,
    AuthenticationError,
    Authenticator,
    Caller,
    OriginError,
    OriginPolicy,
    check_origin,
    is_loopback,
    require,
)
from helios_serve.api.json_body import read_json, request_body
from helios_serve.api.keys import KeyLimits, Scope
from helios_serve.api.limits import Limiter
from helios_serve.api.pages import error_answers
from helios_serve.api.signed_urls import CLIENT_SECRET_TTL_S, ClientSecret, UrlSigner, Use
from helios_serve.errors import NotFoundError
from helios_serve.store.database import Database
from helios_serve.store.schema import job

CLIENT_SECRETS = "/v1/realtime/client_secrets"
TOKEN = "token"
VIEWER_HEADERS = {"referrer-policy": "no-referrer"}
"""On answers whose address may hold a token, so that a page that shows one does not pass it on."""

_SCHEMES = {"ws": "http", "wss": "https"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose a video is, and the key that it was made with."""

    tenant: str
    key_id: str | None


OwnerOf = Callable[[str], Awaitable[Owner | None]]
"""The owner of a video by its id; None when there is no such video."""


class HttpAccess:
    """One for each process. `now`: seconds of the Unix clock.

    Every verb raises AccessError: AuthenticationError, ScopeError, ThrottledError, OriginError, or RateLimitError of
    `Limiter.admit_request`.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        origins: OriginPolicy,
        signer: UrlSigner,
        limiter: Limiter,
        *,
        owner_of: OwnerOf,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._authenticator = authenticator
        self._origins = origins
        self._signer = signer
        self._limiter = limiter
        self._owner_of = owner_of
        self._now = now

    @property
    def is_keyless(self) -> bool:
        return self._authenticator.is_keyless

    async def caller(self, request: Request, scope: Scope) -> Caller:
        """The caller by the `Authorization` header; counts one request of its tenant."""
        self._check_page(request)
        return self._admitted(await self._by_header(request), scope)

    async def viewer(self, request: Request, video_id: str, use: Use) -> Caller:
        """The caller by the header, with the scope read, or by a token signed for this video and use, which reads in
        its owner's name.

        Raises: NotFoundError when the token's video is gone.
        """
        token = request.query_params.get(TOKEN)
        if token is None or "authorization" in request.headers:
            return await self.caller(request, "read")
        self._check_page(request)
        peer = _peer_of(request)
        self._authenticator.check_throttle(peer)
        try:
            self._signer.verify(token, video_id, use, self._now())
        except AuthenticationError:
            self._authenticator.note_failure(peer)
            raise
        return self._admitted(await self._reader_of(video_id, peer), "read")

    async def socket_caller(self, websocket: WebSocket) -> Caller:
        """The caller by the header or by a client secret in the address, with the scope realtime."""
        self._check_page(websocket, is_websocket=True)
        token = websocket.query_params.get(TOKEN)
        if token is None or "authorization" in websocket.headers:
            return self._admitted(await self._by_header(websocket), "realtime")
        peer = _peer_of(websocket)
        self._authenticator.check_throttle(peer)
        try:
            key_id = self._signer.verify_client_secret(token, self._now())
            caller = await self._authenticator.caller_by_id(key_id, peer, self._now())
        except AuthenticationError:
            self._authenticator.note_failure(peer)
            raise
        return self._admitted(caller, "realtime")

    def sign(self, video_id: str, use: Use) -> str:
        """A token for one use of one video, for `?token=`; valid for an hour."""
        return self._signer.sign(video_id, use, self._now())

    def client_secret(self, caller: Caller, ttl_s: int) -> ClientSecret:
        """A token that opens realtime sessions in the caller's name. Raises: InvalidRequestError as the signer does."""
        return self._signer.sign_client_secret(caller, self._now(), ttl_s=ttl_s)

    async def _by_header(self, connection: HTTPConnection) -> Caller:
        header = connection.headers.get("authorization")
        return await self._authenticator.authenticate(header, _peer_of(connection), self._now())

    async def _reader_of(self, video_id: str, peer: str | None) -> Caller:
        """The owner as far as reading goes. With the limits of the key that made the video; of a default key when that
        one is gone, as another key of the tenant may have signed."""
        if self.is_keyless:
            return await self._authenticator.caller_by_id(None, peer, self._now())
        owner = await self._owner_of(video_id)
        if owner is None:
            raise NotFoundError(f"video {video_id[:64]}: not found", param="id")
        try:
            found = await self._authenticator.caller_by_id(owner.key_id, peer, self._now())
            limits, weight = found.limits, found.weight
        except AuthenticationError:
            limits, weight = KeyLimits(), 1.0
        return Caller(
            tenant=owner.tenant, key_id=owner.key_id, scopes=frozenset({"read"}), limits=limits, weight=weight
        )

    def _admitted(self, caller: Caller, scope: Scope) -> Caller:
        require(caller, scope)
        self._limiter.admit_request(caller)
        return caller

    def _check_page(self, connection: HTTPConnection, *, is_websocket: bool = False) -> None:
        """Raises OriginError when a foreign page calls."""
        host = connection.headers.get("host", "")
        scheme = _SCHEMES.get(connection.url.scheme, connection.url.scheme)
        origin = connection.headers.get("origin")
        check_origin(origin, f"{scheme}://{host}", self._origins, is_websocket=is_websocket)
        if origin is None and self.is_keyless and _peer_of(connection) != UNIX_PEER and not _is_own_host(host):
            # A page whose name was pointed at this machine reads from "its own" server, and sends no origin.
            raise OriginError(
                f"host {host[:128]}: a server without API keys is called as localhost or 127.0.0.1, by no other name"
            )


def owners_in(database: Database) -> OwnerOf:
    """Looks owners up in the store."""

    def find(connection: sa.Connection, video_id: str) -> Owner | None:
        query = sa.select(job.c.tenant, job.c.key_id).where(job.c.id == video_id, job.c.state != "deleted")
        row = connection.execute(query).one_or_none()
        return None if row is None else Owner(tenant=row.tenant, key_id=row.key_id)

    async def owner_of(video_id: str) -> Owner | None:
        return await database.read(find, video_id)

    return owner_of


class SecretExpiry(BaseModel):
    """When a client secret ends, counted from its making."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    anchor: Literal["created_at"] = "created_at"
    seconds: int


class ClientSecretBody(BaseModel):
    """What the secret may do is the key's to say; only its time can be chosen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    expires_after: Annotated[SecretExpiry, Field(default=SecretExpiry(seconds=CLIENT_SECRET_TTL_S))]


class ClientSecretAnswer(BaseModel):
    """A token for the address of a realtime session, and the Unix second at which it ends."""

    value: str
    expires_at: int


def client_secret_router(access: HttpAccess) -> APIRouter:
    """`POST /v1/realtime/client_secrets`."""

    async def create(request: Request) -> Response:
        caller = await access.caller(request, "realtime")
        body = await read_json(request, ClientSecretBody, is_optional=True)
        secret = access.client_secret(caller, body.expires_after.seconds)
        answer = ClientSecretAnswer(value=secret.value, expires_at=secret.expires_at)
        return JSONResponse(answer.model_dump(), headers={"cache-control": "no-store"})

    router = APIRouter()
    router.add_api_route(
        CLIENT_SECRETS,
        create,
        methods=["POST"],
        summary="Make a token for a browser's realtime session",
        response_model=ClientSecretAnswer,
        responses=error_answers(400, 415),
        openapi_extra=request_body(ClientSecretBody),
    )
    return router


def _peer_of(connection: HTTPConnection) -> str | None:
    """The client's address without port; UNIX_PEER where the server listens on a socket of this machine."""
    server = connection.scope.get("server")
    if server is not None and server[1] is None:
        return UNIX_PEER
    return None if connection.client is None else connection.client.host


def _is_own_host(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname)
    except ValueError:
        return False
