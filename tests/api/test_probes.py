"""What probes and operators ask: /live by the pulse, /health?deep=1 by golden chunks, and the port of their own. And
what a WebSocket leaves in the log and in a trace."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fastapi import FastAPI, WebSocket
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from helios_serve.api.auth import Authenticator, OriginPolicy
from helios_serve.api.files import FileService
from helios_serve.api.http_access import HttpAccess, owners_in
from helios_serve.api.http_server import Extras, create_admin_app, create_app
from helios_serve.api.keys import KeyRing, new_key
from helios_serve.api.limits import Limiter
from helios_serve.api.media_input import DataUriSource, Media
from helios_serve.api.middleware import RequestCount
from helios_serve.api.outgoing import Outgoing
from helios_serve.api.probes import GoldenProbe, Probes, Pulse
from helios_serve.api.realtime import realtime_route
from helios_serve.api.routes import Desk, ServerSettings
from helios_serve.api.service import ServiceConfig, VideoService
from helios_serve.api.signed_urls import UrlSigner, load_signing_keys
from helios_serve.api.webhooks import WebhookSender
from helios_serve.logs import current_request_id
from helios_serve.store.connect import StoreConfig, open_stores
from helios_serve.telemetry import Metrics
from helios_serve.tracing import current_context
from helios_serve.tracing_otel import OtelTracing
from helios_serve.types import GoldenCheck
from tests.api.conftest import DISTILLED, FakeDecoder, FakeEngine, FakeStills, client_of, join

RIGHT = GoldenCheck(group="dit-0", expected="aa", found="aa")
WRONG = GoldenCheck(group="dit-1", expected="aa", found="ab")
FAILED = GoldenCheck(group="dit-2", expected="aa", found=None, problem="no step boundary within 30 s")
OPEN = ("/live", "/ready", "/health", "/version", "/metrics")
READER, READER_KEY = new_key(scopes=("read",))
ADMIN, ADMIN_KEY = new_key(scopes=("admin",))


class Groups:
    """The groups of an executor as far as golden chunks go."""

    def __init__(self) -> None:
        self.checks: tuple[GoldenCheck, ...] = (RIGHT,)
        self.takes_s = 0.0
        self.num_rounds = 0
        self._lock = threading.Lock()

    def recheck(self, timeout_s: float) -> Sequence[GoldenCheck]:
        assert timeout_s > 0
        assert self._lock.acquire(blocking=False), "two rounds at a time"
        try:
            self.num_rounds += 1
            time.sleep(self.takes_s)
            return self.checks
        finally:
            self._lock.release()


@dataclass(kw_only=True)
class Site:
    """An application with its open routes apart, and one with all its routes."""

    whole: FastAPI
    main: FastAPI
    admin: FastAPI
    engine: FakeEngine
    groups: Groups
    silent_s: float = 0.0


@contextmanager
def site_of(data_dir: Path, *keys: KeyRing) -> Iterator[Site]:
    engine, groups, limiter = FakeEngine(), Groups(), Limiter()
    stores, signing, metrics = open_stores(StoreConfig(data_dir=data_dir)), load_signing_keys(data_dir), Metrics("m")
    service = VideoService(
        stores=stores,
        engine=engine,
        muxer=join,
        stills=FakeStills(),
        model=DISTILLED,
        limiter=limiter,
        metrics=metrics,
        config=ServiceConfig(),
    )
    origins = OriginPolicy(is_keyless=not keys)
    access = HttpAccess(Authenticator(keys), origins, UrlSigner(signing), limiter, owner_of=owners_in(stores.database))
    media = Media(source=DataUriSource(), decoder=FakeDecoder())
    desk = Desk(
        service=service,
        access=access,
        settings=ServerSettings(version="1.2.3", metrics=metrics),
        media_for=lambda _: media,
        webhooks=WebhookSender(stores.access, Outgoing(), signing, metrics=metrics),
    )
    extras = Extras(
        realtime=realtime_route(service, desk.parsed_live, access.socket_caller, desk.links),
        files=FileService(stores.access, stores.blobs, stores.jobs, limiter),
        rows=stores.access,
        origins=origins,
        probes=Probes(pulse=Pulse(lambda: made.silent_s), golden=GoldenProbe(groups.recheck)),
    )
    apart = replace(extras, has_open_routes=False)
    made = Site(
        whole=create_app(desk, extras),
        main=create_app(desk, apart),
        admin=create_admin_app(desk, metrics, apart),
        engine=engine,
        groups=groups,
    )
    try:
        yield made
    finally:
        stores.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_of(tmp_path) as made:
        yield made


def test_live_follows_the_engine(site: Site) -> None:
    client = client_of(site.whole)
    for silent_s, status in ((0.0, 200), (4.9, 200), (5.0, 503), (0.2, 200)):
        site.silent_s = silent_s
        answer = client.get("/live")
        assert answer.status_code == status
        assert client.head("/live").status_code == status
    site.silent_s = 7.25
    assert client.get("/live").json() == {"status": "stuck", "reasons": ["the engine stood still for 7.2 s"]}
    assert client.get("/ready").status_code == 200


def test_a_server_that_is_not_ready_lives(site: Site) -> None:
    site.engine.ready = False
    client = client_of(site.whole)
    assert client.get("/live").status_code == 200
    for path in ("/ready", "/health", "/health?deep=0"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json() == {"status": "not_ready", "reasons": ["no dit worker is up"]}


def test_the_pulse_knows_a_loop_that_stands_still() -> None:
    now = 100.0

    async def main() -> None:
        nonlocal now
        pulse = Pulse(now=lambda: now)
        assert pulse.problems() == []
        beating = asyncio.create_task(pulse.beat())
        await asyncio.sleep(0)
        now += 4.9
        assert pulse.problems() == []
        now += 0.1
        assert pulse.problems() == ["the event loop stood still for 5.0 s"]
        await asyncio.sleep(0.6)
        assert pulse.problems() == []
        beating.cancel()

    asyncio.run(main())


def test_the_open_routes_move(site: Site) -> None:
    main, admin = client_of(site.main), client_of(site.admin)
    for path in OPEN:
        for method in ("GET", "HEAD"):
            assert main.request(method, path).status_code == 404, path
            assert admin.request(method, path).status_code == 200, path
    assert main.get("/metrics").json()["error"]["code"] == "route_not_found"
    for path in ("/", "/docs", "/openapi.json", "/v1/models", "/v1/videos"):
        assert main.get(path).status_code == 200, path
        assert admin.get(path).status_code == (200 if path == "/metrics" else 404), path
    assert not {*OPEN} & {*main.get("/openapi.json").json()["paths"]}
    assert {*OPEN} <= {*client_of(site.whole).get("/openapi.json").json()["paths"]}
    assert "helios:num_requests_running" in admin.get("/metrics").text
    assert admin.get("/ready").headers["x-request-id"].startswith("req_")


def test_the_admin_port_neither_starts_nor_closes_the_service(site: Site) -> None:
    with client_of(site.admin) as admin:
        assert admin.get("/ready").status_code == 200
    with client_of(site.main) as main:
        body = {"prompt": "a fox", "num_frames": 33, "size": "640x384"}
        assert main.post("/v1/videos", json=body).status_code == 200


@pytest.mark.parametrize(
    ("checks", "status", "states"),
    [
        ((RIGHT,), 200, ["ok"]),
        ((RIGHT, WRONG), 503, ["ok", "wrong"]),
        ((FAILED, RIGHT), 503, ["failed", "ok"]),
        ((), 503, []),
        ((GoldenCheck(group="dit-0", expected=None, found="aa"),), 503, ["wrong"]),
    ],
)
def test_deep_health_compares_every_group(
    site: Site, checks: tuple[GoldenCheck, ...], status: int, states: list[str]
) -> None:
    site.groups.checks = checks
    answer = client_of(site.whole).get("/health", params={"deep": 1})
    assert answer.status_code == status
    assert answer.json()["status"] == ("ok" if status == 200 else "wrong")
    assert [group["status"] for group in answer.json()["groups"]] == states
    assert [group["found"] for group in answer.json()["groups"]] == [check.found for check in checks]
    assert answer.headers["cache-control"] == "no-store"


def test_deep_health_needs_the_scope_admin(tmp_path: Path) -> None:
    with site_of(tmp_path, KeyRing([READER_KEY, ADMIN_KEY])) as site:
        for app in (site.whole, site.admin):
            client = client_of(app)
            assert client.get("/health").status_code == 200
            assert client.get("/health?deep=1").status_code == 401
            refused = client.get("/health?deep=1", headers={"authorization": f"Bearer {READER}"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
            assert client.get("/health?deep=1", headers={"authorization": f"Bearer {ADMIN}"}).status_code == 200
        assert site.groups.num_rounds == 2
        bad = client.get("/health?deep=yes")
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "deep")


def test_one_round_of_golden_chunks_runs_at_a_time() -> None:
    groups = Groups()
    groups.takes_s = 0.2
    probe = GoldenProbe(groups.recheck)

    async def main() -> None:
        asked = [asyncio.create_task(probe.checks()) for _ in range(5)]
        await asyncio.sleep(0.05)
        asked[0].cancel()  # whoever began it leaves
        assert await asyncio.gather(*asked[1:]) == [(RIGHT,)] * 4
        assert groups.num_rounds == 1
        await probe.checks()
        assert groups.num_rounds == 2

    asyncio.run(main())


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_socket_is_a_line_and_a_span(caplog: pytest.LogCaptureFixture) -> None:
    exporter = InMemorySpanExporter()
    tracing = OtelTracing(exporter, version="1")
    app = FastAPI()
    seen: list[tuple[str | None, bool]] = []

    @app.websocket("/ws/{name}")
    async def serve(websocket: WebSocket, name: str) -> None:
        seen.append((current_request_id(), current_context() is not None))
        if name == "refused":
            await websocket.close(4401)
            return
        await websocket.accept()
        await websocket.receive_text()
        await websocket.send_text("grün")
        await websocket.send_bytes(b"12345")
        if name == "left":
            await websocket.receive()
            return
        if name == "broken":
            raise RuntimeError("broken")
        await websocket.close(1012)

    app.add_middleware(RequestCount, metrics=Metrics("m"), tracing=tracing)
    headers = {"traceparent": TRACEPARENT, "x-request-id": "mine", "authorization": "Bearer hs_secret"}
    with caplog.at_level("INFO", "helios_serve.access"), client_of(app) as client:
        with client.websocket_connect("/ws/ended?token=secret", headers=headers) as socket:
            socket.send_text("a secret prompt")
            assert socket.receive_text() == "grün"
            assert socket.receive_bytes() == b"12345"
            with pytest.raises(WebSocketDisconnect):
                socket.receive_text()
        with client.websocket_connect("/ws/left") as socket:
            socket.send_text("a")
            socket.close(1001)
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws/refused"):
            pass
        with pytest.raises(RuntimeError, match="broken"):
            _talk(client, "/ws/broken")
    tracing.close()

    lines = [record for record in caplog.records if record.name == "helios_serve.access"]
    assert [line.getMessage() for line in lines] == [
        "WEBSOCKET /ws/ended 1012",
        "WEBSOCKET /ws/left 1001",
        "WEBSOCKET /ws/refused 403",
        "WEBSOCKET /ws/broken 1006",
    ]
    first = vars(lines[0])
    assert (first["num_bytes"], first["template"], first["client"]) == (10, "/ws/{name}", "127.0.0.1")
    assert "secret" not in "".join(str(vars(line)) for line in lines)
    assert seen[0] == ("mine", True)
    assert str(seen[1][0]).startswith("req_")
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["WEBSOCKET /ws/{name}"] * 4
    assert spans[0].parent is not None
    assert spans[0].parent.span_id == 0xB7AD6B7169203331
    assert [dict(span.attributes or {})["websocket.close_code"] for span in spans] == [1012, 1001, 403, 1006]
    statuses = [span.status.status_code for span in spans]
    assert statuses == [trace.StatusCode.UNSET] * 3 + [trace.StatusCode.ERROR]


def _talk(client: TestClient, path: str) -> None:
    with client.websocket_connect(path) as socket:
        socket.send_text("a")
        while True:
            socket.receive_text()


def test_a_session_of_the_server_is_a_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "helios_serve.access"), client_of(site.whole) as client:
        with pytest.raises(WebSocketDisconnect) as caught:
            _talk(client, "/v1/realtime/video?token=hidden")
        assert caught.value.code != 1000
    (line,) = [record for record in caplog.records if record.name == "helios_serve.access"]
    assert line.getMessage() == f"WEBSOCKET /v1/realtime/video {caught.value.code}"
    assert "hidden" not in str(vars(line))
