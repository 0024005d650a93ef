"""The routes about the server itself: models, health, version, metrics, the page."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from helios_serve.api import schemas
from helios_serve.api.http_request import accept_weights
from helios_serve.api.jobs import model_object
from helios_serve.api.names import shown
from helios_serve.api.playground import PlaygroundFile, playground_files, playground_headers
from helios_serve.api.routes import VIDEOS, Desk, add_get
from helios_serve.errors import NotFoundError
from helios_serve.telemetry import Metrics


def add_system_routes(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    """Registers the routes; before any that match `/v1/videos/{id}`."""
    routes = _Routes(desk, metrics)
    add_get(app, f"{VIDEOS}/models", routes.models, schemas.ModelList)
    add_get(app, "/v1/models", routes.models, schemas.ModelList)
    # A hub id holds a slash.
    add_get(app, "/v1/models/{model_id:path}", routes.model, schemas.ModelItem, 404)
    add_get(app, "/health", routes.health, None, 503)
    add_get(app, "/ready", routes.health, None, 503)
    add_get(app, "/live", routes.live, None)
    add_get(app, "/version", routes.version, None)
    formats: dict[int | str, dict[str, Any]] = {200: {"content": {"application/openmetrics-text": {}}}}
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], response_class=PlainTextResponse, responses=formats)
    app.add_api_route("/metrics", routes.metrics, methods=["HEAD"], include_in_schema=False)
    _add_playground(app)


class _Routes:
    """The handlers: one method per route."""

    def __init__(self, desk: Desk, metrics: Metrics) -> None:
        self._desk = desk
        self._service = desk.service
        self._settings = desk.settings
        self._metrics = metrics
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        await self._desk.access.caller(request, "read")
        item = model_object(self._service.model, self._created, self._settings.limits)
        return JSONResponse(schemas.ModelList(object="list", data=[item]).model_dump())

    async def model(self, request: Request, model_id: str) -> Response:
        await self._desk.access.caller(request, "read")
        served = self._service.model
        if model_id not in (served.name, *self._settings.limits.model_aliases):
            message = f"model {shown(model_id)}: not served here; served: {served.name}"
            raise NotFoundError(message, param="model", code="model_not_found")
        return JSONResponse(model_object(served, self._created, self._settings.limits).model_dump())

    async def health(self) -> Response:
        reasons = self._service.not_ready_reasons()
        if not reasons:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not_ready", "reasons": reasons}, status_code=503)

    async def live(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def version(self) -> Response:
        return JSONResponse({"version": self._settings.version, "model": self._service.model.name})

    async def metrics(self, request: Request) -> Response:
        weights = accept_weights(request, "text/plain", "application/openmetrics-text")
        wants_openmetrics = weights["application/openmetrics-text"] > weights["text/plain"]
        text, content_type = self._metrics.render(openmetrics=wants_openmetrics)
        return Response(text, headers={"content-type": content_type})


def _add_playground(app: FastAPI) -> None:
    """The page at `/` and what it loads."""
    headers = playground_headers()

    def answer(file: PlaygroundFile) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            own = {**headers, "etag": file.etag}
            if request.headers.get("if-none-match") == file.etag:
                return Response(status_code=304, headers=own)
            return Response(file.body, headers=own, media_type=file.media_type)

        return serve

    for path, file in playground_files().items():
        app.add_api_route(path, answer(file), methods=["GET", "HEAD"], include_in_schema=False)
