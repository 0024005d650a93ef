"""The HTTP application: which routes there are, and how errors are answered. Translates to `VideoService` and back, and
nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from helios_serve.api import schemas
from helios_serve.api.auth import AccessError, OriginPolicy
from helios_serve.api.content import RangeNotSatisfiableError
from helios_serve.api.cors import Cors
from helios_serve.api.extension import ExtensionBody, InputExtensionBody, RemixBody
from helios_serve.api.file_routes import FILES, file_router
from helios_serve.api.files import FileService
from helios_serve.api.generation_routes import SYNC, add_generation_routes
from helios_serve.api.http_access import client_secret_router
from helios_serve.api.middleware import BodyLimit, HeadLimit, RequestBoundary, RequestCount, error_response
from helios_serve.api.probes import Probes
from helios_serve.api.realtime import RealtimeRoute
from helios_serve.api.routes import GENERATIONS, VIDEOS, Desk
from helios_serve.api.system_routes import add_open_routes, add_system_routes
from helios_serve.api.video_routes import add_video_routes
from helios_serve.api.webhook_routes import webhook_router
from helios_serve.errors import HeliosError, InvalidRequestError
from helios_serve.store.access import Access
from helios_serve.telemetry import AUTH_FAILURES, Metrics

_TELEMETRY_OFF: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}


class RouteError(HeliosError):
    """No such route, or not with this method: what the framework itself refuses."""

    retryable = False

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message, code=code)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What the application offers beside videos: sessions, uploads, webhooks, and the pages that may call.

    has_open_routes: False where probes and scrapers have a port of their own, with `create_admin_app` behind it.
    """

    realtime: RealtimeRoute
    files: FileService
    rows: Access
    origins: OriginPolicy
    probes: Probes = field(default_factory=Probes)
    has_open_routes: bool = True


def create_app(desk: Desk, extras: Extras) -> FastAPI:
    """The ASGI application. It starts the service, and its shutdown closes it."""
    service, settings = desk.service, desk.settings

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        sending = asyncio.create_task(desk.webhooks.run())
        yield
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await service.close()
        desk.parsing.shutdown(wait=False, cancel_futures=True)

    app = _HeliosApp(
        title="helios_serve",
        version=settings.version,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_TELEMETRY_OFF,
    )
    metrics = Metrics(service.model.name) if settings.metrics is None else settings.metrics
    add_system_routes(app, desk)
    if extras.has_open_routes:
        add_open_routes(app, desk, metrics, extras.probes)
    add_generation_routes(app, desk)
    for router in (
        file_router(extras.files, desk.access),
        webhook_router(extras.rows, desk.webhooks, desk.access),
        client_secret_router(desk.access),
    ):
        app.router.routes.extend(router.routes)  # each with its own path, by which requests are counted
    app.add_api_websocket_route("/v1/realtime/video", extras.realtime.serve)
    add_video_routes(app, desk)
    _add_error_handlers(app, metrics)
    large = dict.fromkeys((GENERATIONS, SYNC, VIDEOS, f"{VIDEOS}/extensions", FILES), settings.max_body_bytes)
    _add_layers(app, desk, metrics, extras.origins, large)
    return app


def create_admin_app(desk: Desk, metrics: Metrics, extras: Extras) -> FastAPI:
    """The open routes alone, for a port of their own. Neither starts nor closes the service."""
    app = FastAPI(
        title="helios_serve: open routes",
        openapi_url=None,
        redirect_slashes=False,
        telemetry=_TELEMETRY_OFF,
    )
    add_open_routes(app, desk, metrics, extras.probes)
    _add_error_handlers(app, metrics)
    _add_layers(app, desk, metrics, extras.origins, {})
    return app


def _add_layers(
    app: FastAPI, desk: Desk, metrics: Metrics, origins: OriginPolicy, bytes_by_path: Mapping[str, int]
) -> None:
    """What surrounds every request; the last one is the outermost."""
    settings = desk.settings
    app.add_middleware(BodyLimit, default_bytes=settings.max_other_body_bytes, bytes_by_path=bytes_by_path)
    app.add_middleware(HeadLimit, max_bytes=settings.max_head_bytes)
    app.add_middleware(RequestBoundary)
    app.add_middleware(Cors, policy=origins)
    app.add_middleware(RequestCount, metrics=metrics, tracing=settings.tracing)


class _HeliosApp(FastAPI):
    """Adds the schemas of request bodies, which the routes read by hand, to the OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for body in (schemas.GenerationBody, ExtensionBody, InputExtensionBody, RemixBody):
            document["components"]["schemas"].update(_body_schemas(body))
        return document


def _body_schemas(body: type[BaseModel]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    nested = schema.pop("$defs", {})
    return {body.__name__: schema, **nested}


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    async def helios_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HeliosError)
        if isinstance(error, RangeNotSatisfiableError):
            return error_response(error, {"content-range": f"bytes */{error.num_bytes}"})
        if isinstance(error, AccessError):
            if error.code in AUTH_FAILURES:
                metrics.auth_failed(error.code)
            return error_response(error, error.headers)
        return error_response(error)

    async def framework_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            ours = RouteError(f"{where}: no such route", status=404, code="route_not_found")
        elif error.status_code == 405:
            ours = RouteError(f"{where}: the route does not take this method", status=405, code="method_not_allowed")
        else:
            ours = RouteError(str(error.detail), status=error.status_code, code="invalid_value")
        return error_response(ours, error.headers)

    async def validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        detail = error.errors()[0]
        name = str(detail["loc"][-1])
        return error_response(InvalidRequestError(f"{name}: {detail['msg']}", param=name))

    app.add_exception_handler(HeliosError, helios_error)
    app.add_exception_handler(HTTPException, framework_error)
    app.add_exception_handler(RequestValidationError, validation_error)
