"""Who may call over HTTP: headers, tokens, origins, and what a page of a listed origin may read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from helios_serve.api.auth import (
    EXPOSED_HEADERS,
    MAX_FAILURES,
    AccessError,
    Authenticator,
    Caller,
    FailureThrottle,
    OriginPolicy,
)
from helios_serve.api.cors import Cors
from helios_serve.api.http_access import HttpAccess, Owner, client_secret_router, owners_in
from helios_serve.api.keys import Key, KeyLimits, KeyRing, Scope, new_key
from helios_serve.api.limits import Limiter
from helios_serve.api.middleware import BodyLimit, RequestBoundary, error_response
from helios_serve.api.signed_urls import CLIENT_SECRET_TTL_S, URL_TTL_S, UrlSigner, signing_keys_from
from helios_serve.errors import HeliosError
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from tests.store.helpers import new_job

KEYS = signing_keys_from("current " * 8, "previous " * 8)
BASE = "http://127.0.0.1:8000"
SOCKET_BASE = "ws://127.0.0.1:8000"
LISTED = "https://app.example"
FOREIGN = "https://evil.example"


@dataclass(slots=True)
class Clock:
    """A Unix clock and a monotonic one that stand still."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class World:
    """Keys, clocks and stores around one `HttpAccess`."""

    stores: Stores
    clock: Clock = field(default_factory=Clock)
    keys: list[Key] = field(default_factory=list)
    origins: frozenset[str] = frozenset({LISTED})
    is_keyless: bool = False

    def key(
        self, tenant: str, scopes: Sequence[Scope] = ("generate", "read", "realtime", "webhooks"), **changes: Any
    ) -> str:
        """A new key's bearer header."""
        plain, key = new_key(tenant=tenant, scopes=scopes, **changes)
        self.keys.append(key)
        return f"Bearer {plain}"

    def access(self) -> HttpAccess:
        """Knows the keys made so far."""
        sources = [] if self.is_keyless else [KeyRing(self.keys)]
        return HttpAccess(
            Authenticator(sources, FailureThrottle(clock=self.clock)),
            OriginPolicy(is_keyless=self.is_keyless, allowed=self.origins),
            UrlSigner(KEYS),
            Limiter(clock=self.clock),
            owner_of=owners_in(self.stores.database),
            now=self.clock,
        )


def serve(world: World, *routers: APIRouter, max_bytes: int = 1 << 20, large: dict[str, int] | None = None) -> FastAPI:
    """An application with these routes, and around them what surrounds every route."""
    app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False})

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HeliosError)
        return error_response(error, error.headers if isinstance(error, AccessError) else None)

    for router in routers:
        app.router.routes.extend(router.routes)
    app.add_exception_handler(HeliosError, refuse)
    app.add_middleware(BodyLimit, default_bytes=max_bytes, bytes_by_path=large or {})
    app.add_middleware(RequestBoundary)
    app.add_middleware(Cors, policy=OriginPolicy(is_keyless=world.is_keyless, allowed=world.origins))
    return app


def echo_router(access: HttpAccess) -> APIRouter:
    """Routes that answer who called."""

    async def read(request: Request) -> Response:
        return _about(await access.caller(request, "read"))

    async def content(request: Request, video_id: str) -> Response:
        return _about(await access.viewer(request, video_id, "content"))

    async def crash(request: Request) -> Response:
        raise RuntimeError("a defect")

    async def socket(websocket: WebSocket) -> None:
        try:
            caller = await access.socket_caller(websocket)
        except AccessError as error:
            await websocket.close(4000 + error.status, error.code)
            return
        await websocket.accept()
        await websocket.send_text(f"{caller.tenant} {caller.key_id}")
        await websocket.close()

    router = APIRouter()
    router.add_api_route("/read", read)
    router.add_api_route("/videos/{video_id}/content", content)
    router.add_api_route("/crash", crash)
    router.add_api_websocket_route("/socket", socket)
    return router


def _about(caller: Caller) -> Response:
    limits = None if caller.limits is None else caller.limits.requests_per_second
    return JSONResponse(
        {"tenant": caller.tenant, "key_id": caller.key_id, "scopes": sorted(caller.scopes), "limit": limits}
    )


@contextlib.asynccontextmanager
async def calling(
    app: FastAPI, authorization: str | None = None, peer: str = "127.0.0.1"
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client in the same event loop."""
    transport = httpx2.ASGITransport(app=app, client=(peer, 50_000))
    headers = {} if authorization is None else {"authorization": authorization}
    async with httpx2.AsyncClient(transport=transport, base_url=BASE, headers=headers) as client:
        yield client


@pytest.fixture
def world(tmp_path: Path) -> Any:
    stores = open_stores(StoreConfig(data_dir=tmp_path / "data"))
    yield World(stores)
    stores.close()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


def assert_refused(response: httpx2.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert response.headers["x-request-id"].startswith("req_")


def test_the_header_names_the_caller_and_scopes_and_rates_hold(world: World) -> None:
    bearer = world.key("a", limits=KeyLimits(requests_per_second=2))
    no_read = world.key("b", scopes=["generate"])
    app = serve(world, echo_router(world.access()))

    async def work() -> None:
        async with calling(app) as client:
            answer = await client.get("/read")
            assert_refused(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-should-retry"] == "false"
            assert_refused(await client.get("/read", headers={"authorization": no_read}), 403, "insufficient_scope")
            for _ in range(2):
                answer = await client.get("/read", headers={"authorization": bearer})
                assert (answer.status_code, answer.json()["tenant"]) == (200, "a")
            answer = await client.get("/read", headers={"authorization": bearer})
            assert_refused(answer, 429, "rate_limit_exceeded")
            assert answer.headers["retry-after"] == "1"
            world.clock.now += 1
            assert (await client.get("/read", headers={"authorization": bearer})).status_code == 200

    run(work)


def test_guessing_is_throttled_by_address_for_keys_and_tokens_alike(world: World) -> None:
    bearer = world.key("a")
    app = serve(world, echo_router(world.access()))

    async def work() -> None:
        async with calling(app, peer="203.0.113.7") as guesser, calling(app, peer="203.0.113.8") as other:
            for number in range(MAX_FAILURES):
                if number % 2:
                    wrong = {"authorization": f"Bearer hs_abcd_{number:064x}"}
                    assert_refused(await guesser.get("/read", headers=wrong), 401, "invalid_api_key")
                else:
                    assert_refused(await guesser.get(f"/videos/v/content?token=x{number}"), 401, "invalid_api_key")
            right = {"authorization": bearer}
            answer = await guesser.get("/read", headers=right)
            assert_refused(answer, 429, "auth_throttled")
            assert 0 < int(answer.headers["retry-after"]) <= 60
            assert_refused(await guesser.get("/videos/v/content?token=x"), 429, "auth_throttled")
            assert (await other.get("/read", headers=right)).status_code == 200
            world.clock.now += 61
            assert (await guesser.get("/read", headers=right)).status_code == 200

    run(work)


def test_a_token_shows_one_use_of_one_video_in_its_owners_name(world: World) -> None:
    bearer = world.key("a", limits=KeyLimits(requests_per_second=7))
    reader = world.key("b")
    access = world.access()
    app = serve(world, echo_router(access))

    async def work() -> None:
        mine = new_job(tenant="a", key_id=world.keys[0].id)
        orphan = new_job(tenant="a", key_id="gone")
        for job in (mine, orphan):
            await world.stores.jobs.create(job)
        path = f"/videos/{mine.id}/content"
        token = access.sign(mine.id, "content")
        async with calling(app) as client:
            answer = await client.get(path, params={"token": token})
            expected = {"tenant": "a", "key_id": world.keys[0].id, "scopes": ["read"], "limit": 7}
            assert (answer.status_code, answer.json()) == (200, expected)
            answer = await client.get(
                f"/videos/{orphan.id}/content", params={"token": access.sign(orphan.id, "content")}
            )
            assert answer.json() == {"tenant": "a", "key_id": "gone", "scopes": ["read"], "limit": 50}
            for wrong in (access.sign(mine.id, "stream"), access.sign(orphan.id, "content"), token[:-1], ""):
                assert_refused(await client.get(path, params={"token": wrong}), 401, "invalid_api_key")
            assert_refused(await client.get(path), 401, "invalid_api_key")
            by_header = await client.get(path, params={"token": "bad"}, headers={"authorization": reader})
            assert by_header.json()["tenant"] == "b"
            assert (await client.get(path, headers={"authorization": bearer})).json()["tenant"] == "a"
            gone = access.sign("video_none", "content")
            assert_refused(
                await client.get("/videos/video_none/content", params={"token": gone}), 404, "video_not_found"
            )
            world.clock.now += URL_TTL_S
            assert_refused(await client.get(path, params={"token": token}), 401, "invalid_api_key")

    run(work)


def test_the_token_of_a_deleted_video_finds_nothing(world: World) -> None:
    world.key("a")
    access = world.access()
    app = serve(world, echo_router(access))

    async def work() -> None:
        job = new_job(tenant="a")
        await world.stores.jobs.create(job)
        assert await owners_in(world.stores.database)(job.id) == Owner(tenant="a", key_id=None)
        await world.stores.jobs.cancel("a", job.id)
        await world.stores.jobs.delete("a", job.id)
        async with calling(app) as client:
            answer = await client.get(f"/videos/{job.id}/content", params={"token": access.sign(job.id, "content")})
            assert_refused(answer, 404, "video_not_found")

    run(work)


def test_client_secrets_open_sockets_in_the_name_of_their_key(world: World) -> None:
    bearer, no_realtime = world.key("a"), world.key("b", scopes=["read"])
    access = world.access()
    app = serve(world, echo_router(access), client_secret_router(access))
    client = TestClient(app, base_url=BASE, client=("127.0.0.1", 5))
    path = "/v1/realtime/client_secrets"
    assert client.post(path).status_code == 401
    assert client.post(path, headers={"authorization": no_realtime}).status_code == 403
    mine = {"authorization": bearer}
    made = client.post(path, headers=mine)
    assert made.status_code == 200
    assert set(made.json()) == {"value", "expires_at"}
    assert made.json()["expires_at"] == world.clock.now + CLIENT_SECRET_TTL_S
    assert made.headers["cache-control"] == "no-store"
    short = client.post(path, headers=mine, json={"expires_after": {"anchor": "created_at", "seconds": 10}})
    assert short.json()["expires_at"] == world.clock.now + 10
    for body, param in (
        ({"expires_after": {"seconds": 601}}, "expires_after"),
        ({"expires_after": {"seconds": "ten"}}, "expires_after.seconds"),
        ({"session": {}}, "session"),
    ):
        refused = client.post(path, headers=mine, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)

    def greeting(url: str, headers: dict[str, str] | None = None) -> str:
        with client.websocket_connect(f"ws://127.0.0.1:8000{url}", headers=headers or {}) as socket:
            return socket.receive_text()

    def closing(url: str, headers: dict[str, str] | None = None) -> str:
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            client.websocket_connect(f"ws://127.0.0.1:8000{url}", headers=headers or {}),
        ):
            pass
        return str(caught.value.reason)

    expected = f"a {world.keys[0].id}"
    secret = made.json()["value"]
    assert greeting("/socket", mine) == expected
    assert greeting(f"/socket?token={secret}") == expected
    assert greeting(f"/socket?token={secret}", {"origin": LISTED}) == expected
    assert greeting(f"/socket?token={secret}", {"origin": BASE}) == expected
    assert closing(f"/socket?token={secret}", {"origin": FOREIGN}) == "origin_not_allowed"
    assert closing("/socket", {**mine, "origin": FOREIGN}) == "origin_not_allowed"
    assert closing("/socket") == "invalid_api_key"
    assert closing("/socket?token=" + access.sign("v", "content")) == "invalid_api_key"
    assert closing("/socket", {"authorization": no_realtime}) == "insufficient_scope"
    world.clock.now += CLIENT_SECRET_TTL_S
    assert closing(f"/socket?token={secret}") == "invalid_api_key"


def test_a_revoked_key_ends_its_client_secrets(world: World) -> None:
    world.key("a")
    secret = UrlSigner(KEYS).sign_client_secret(
        Caller(tenant="a", key_id=world.keys[0].id, scopes=frozenset({"realtime"}), limits=None), world.clock.now
    )
    world.keys.clear()
    client = TestClient(serve(world, echo_router(world.access())), base_url=BASE, client=("127.0.0.1", 5))
    with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect(f"/socket?token={secret.value}"):
        pass
    assert caught.value.reason == "invalid_api_key"


def test_without_keys_only_this_machine_and_its_own_pages_call(world: World) -> None:
    world.is_keyless = True
    access = world.access()
    assert access.is_keyless
    app = serve(world, echo_router(access), client_secret_router(access))

    async def work() -> None:
        async with calling(app) as client, calling(app, peer="192.168.1.5") as stranger:
            assert (await client.get("/read")).json()["key_id"] is None
            assert_refused(await stranger.get("/read"), 401, "invalid_api_key")
            for origin, status in (
                (BASE, 200),
                (LISTED, 200),
                (FOREIGN, 403),
                ("null", 403),
                ("http://localhost:1", 403),
            ):
                assert (await client.get("/read", headers={"origin": origin})).status_code == status, origin
            for host, status in (
                ("localhost:8000", 200),
                ("[::1]:8000", 200),
                ("rebound.example", 403),
                ("127.0.0.1.rebound.example", 403),
                ("[::1", 403),
                ("", 403),
            ):
                answer = await client.get("/read", headers={"host": host})
                assert answer.status_code == status, host
            url = f"/videos/v/content?token={access.sign('v', 'content')}"
            assert (await client.get(url)).status_code == 200
            assert (await client.post("/v1/realtime/client_secrets")).status_code == 200

    run(work)


def test_a_unix_socket_counts_as_this_machine(world: World) -> None:
    world.is_keyless = True
    app = serve(world, echo_router(world.access()))
    sent: list[dict[str, Any]] = []

    async def work() -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/read",
            "raw_path": b"/read",
            "query_string": b"",
            "headers": [(b"host", b"anything")],
            "scheme": "http",
            "server": ("/run/helios.sock", None),
            "client": None,
            "root_path": "",
            "http_version": "1.1",
        }

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    run(work)
    assert sent[0]["status"] == 200


def test_preflights_of_listed_origins_alone_are_answered(world: World) -> None:
    world.key("a")
    app = serve(world, echo_router(world.access()))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}

    async def work() -> None:
        async with calling(app) as client:
            answer = await client.options("/read", headers={"origin": LISTED, **asked})
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == LISTED
            assert answer.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in answer.headers
            assert answer.headers["x-request-id"].startswith("req_")
            assert "origin" in answer.headers["vary"].lower()
            for origin in (
                FOREIGN,
                "null",
                "https://app.example.evil",
                "https://app.example:444",
                "http://app.example",
            ):
                answer = await client.options("/read", headers={"origin": origin, **asked})
                assert answer.status_code == 405
                assert not [name for name in answer.headers if name.startswith("access-control")]
                assert "origin" in answer.headers["vary"].lower()

    run(work)


def test_answers_and_errors_carry_the_headers_for_listed_origins(world: World) -> None:
    bearer = world.key("a")
    app = serve(world, echo_router(world.access()), max_bytes=10)

    async def work() -> None:
        async with calling(app, bearer) as client:
            for path, status, body in (
                ("/read", 200, b""),
                ("/videos/v/content?token=x", 200, b""),
                ("/none", 404, b""),
                ("/read", 413, b"x" * 11),
                ("/crash", 500, b""),
            ):
                answer = await client.request("GET", path, headers={"origin": LISTED}, content=body)
                assert answer.status_code == status, path
                assert answer.headers["access-control-allow-origin"] == LISTED
                assert answer.headers["access-control-expose-headers"] == ", ".join(EXPOSED_HEADERS)
                foreign = await client.request("GET", path, headers={"origin": FOREIGN}, content=body)
                assert foreign.status_code == status
                assert not [name for name in foreign.headers if name.startswith("access-control")]
            bad = await client.get("/read", headers={"origin": LISTED, "authorization": "Bearer no"})
            assert_refused(bad, 401, "invalid_api_key")
            assert bad.headers["access-control-allow-origin"] == LISTED

    run(work)


def test_cors_is_off_by_default(world: World) -> None:
    world.key("a")
    world.origins = frozenset()
    app = serve(world, echo_router(world.access()))

    async def work() -> None:
        async with calling(app) as client:
            answer = await client.options("/read", headers={"origin": LISTED, "access-control-request-method": "GET"})
            assert answer.status_code == 405
            assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]

    run(work)


def test_routes_that_were_added_one_by_one_are_in_the_document(world: World) -> None:
    app = serve(world, client_secret_router(world.access()))
    document = app.openapi()
    operation = document["paths"]["/v1/realtime/client_secrets"]["post"]
    assert set(operation["responses"]) >= {"200", "400", "401", "403", "429"}
    assert "$defs" not in json.dumps(document)
