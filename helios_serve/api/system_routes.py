"""The routes about the server itself: models and the page, which clients read; and the open ones, which probes and
scrapers read, and which may have a port of their own."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from helios_serve.api import schemas
from helios_serve.api.http_request import accept_weights
from helios_serve.api.jobs import model_object
from helios_serve.api.names import shown
from helios_serve.api.pages import add_get, error_answers
from helios_serve.api.playground import PlaygroundFile, playground_files, playground_headers
from helios_serve.api.probes import Probes
from helios_serve.api.routes import VIDEOS, Desk
from helios_serve.errors import NotFoundError
from helios_serve.telemetry import Metrics
from helios_serve.types import GoldenCheck


class ProbeAnswer(BaseModel):
    """`ok` with status 200; anything else with 503, and why."""

    status: Literal["ok", "not_ready", "stuck"]
    reasons: list[str] | None = None


class GoldenAnswer(BaseModel):
    """A DiT group's golden chunk: `wrong` when its digest is not what it was at the start, `failed` when it could not
    be made, and why."""

    group: str
    status: Literal["ok", "wrong", "failed"]
    expected: str | None
    found: str | None
    problem: str | None


class DeepAnswer(BaseModel):
    """`ok` when there is a group, and every one makes its golden chunk as it did at the start."""

    status: Literal["ok", "wrong"]
    groups: list[GoldenAnswer]


def add_system_routes(app: FastAPI, desk: Desk) -> None:
    """Registers models and the page; before any route that matches `/v1/videos/{id}`."""
    routes = _Routes(desk)
    add_get(app, f"{VIDEOS}/models", routes.models, schemas.ModelList)
    add_get(app, "/v1/models", routes.models, schemas.ModelList)
    # A hub id holds a slash.
    add_get(app, "/v1/models/{model_id:path}", routes.model, schemas.ModelItem, 404)
    _add_playground(app, desk)


def add_open_routes(app: FastAPI, desk: Desk, metrics: Metrics, probes: Probes) -> None:
    """Registers /live, /ready, /health, /version and /metrics."""
    routes = _OpenRoutes(desk, metrics, probes)
    health: Any = ProbeAnswer | DeepAnswer
    deep = error_answers(400) | {503: {"model": health}}
    _add_probe(app, "/health", routes.health, health, deep)
    _add_probe(app, "/ready", routes.ready, ProbeAnswer, {503: {"model": ProbeAnswer}})
    _add_probe(app, "/live", routes.live, ProbeAnswer, {503: {"model": ProbeAnswer}})
    add_get(app, "/version", routes.version, None)
    formats: dict[int | str, dict[str, Any]] = {200: {"content": {"application/openmetrics-text": {}}}}
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], response_class=PlainTextResponse, responses=formats)
    app.add_api_route("/metrics", routes.metrics, methods=["HEAD"], include_in_schema=False)


class _Routes:
    """One method per route that clients read."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._service = desk.service
        self._settings = desk.settings
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


class _OpenRoutes:
    """One method per open route."""

    def __init__(self, desk: Desk, metrics: Metrics, probes: Probes) -> None:
        self._desk = desk
        self._service = desk.service
        self._settings = desk.settings
        self._metrics = metrics
        self._probes = probes

    async def ready(self) -> Response:
        return _status_answer("not_ready", self._service.not_ready_reasons())

    async def health(self, request: Request, deep: Literal["0", "1"] = "0") -> Response:
        """As `ready`; with `deep=1`, for the scope admin, whether every DiT group still makes its golden chunk."""
        if deep == "0":
            return await self.ready()
        access = self._desk.access
        await access.caller(request, "read" if access.is_keyless else "admin")  # without keys it is this machine's user
        checks = await self._probes.golden.checks()
        is_right = bool(checks) and all(check.is_right for check in checks)
        answer = DeepAnswer(status="ok" if is_right else "wrong", groups=[_golden_answer(check) for check in checks])
        headers = {"cache-control": "no-store"}
        return JSONResponse(answer.model_dump(), status_code=200 if is_right else 503, headers=headers)

    async def live(self) -> Response:
        return _status_answer("stuck", self._probes.pulse.problems())

    async def version(self) -> Response:
        served = {"version": self._settings.version, "model": self._service.model.name}
        return JSONResponse({**served, **self._settings.about})

    async def metrics(self, request: Request) -> Response:
        weights = accept_weights(request, "text/plain", "application/openmetrics-text")
        wants_openmetrics = weights["application/openmetrics-text"] > weights["text/plain"]
        text, content_type = self._metrics.render(openmetrics=wants_openmetrics)
        return Response(text, headers={"content-type": content_type})


def _status_answer(otherwise: str, reasons: list[str]) -> Response:
    if not reasons:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": otherwise, "reasons": reasons}, status_code=503)


def _golden_answer(check: GoldenCheck) -> GoldenAnswer:
    differs: Literal["wrong", "failed"] = "failed" if check.found is None else "wrong"
    return GoldenAnswer(
        group=check.group,
        status="ok" if check.is_right else differs,
        expected=check.expected,
        found=check.found,
        problem=check.problem,
    )


def _add_probe(
    app: FastAPI, path: str, endpoint: Callable[..., Any], answer: Any, responses: dict[int | str, dict[str, Any]]
) -> None:
    app.add_api_route(path, endpoint, methods=["GET"], response_model=answer, responses=responses)
    app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)


def _add_playground(app: FastAPI, desk: Desk) -> None:
    """The page at `/` and what it loads. It may play what `content` redirects to."""

    def answer(file: PlaygroundFile) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            own = {**playground_headers(await desk.redirect_origins()), "etag": file.etag}
            if request.headers.get("if-none-match") == file.etag:
                return Response(status_code=304, headers=own)
            return Response(file.body, headers=own, media_type=file.media_type)

        return serve

    for path, file in playground_files().items():
        app.add_api_route(path, answer(file), methods=["GET", "HEAD"], include_in_schema=False)
