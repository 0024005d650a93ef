"""The HTTP surface: routes, content types, status codes. Translates to `VideoService` and back, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from helios_serve.api import schemas
from helios_serve.api.content import RangeNotSatisfiableError, video_response, whole_video
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.jobs import Job, StoredVideo, content_url, generation_object, model_object, video_object
from helios_serve.api.media_input import DataUriSource, Media, MediaDecoder
from helios_serve.api.middleware import BodyLimit, RequestBoundary, RequestCount, error_response
from helios_serve.api.names import shown
from helios_serve.api.service import VideoService
from helios_serve.errors import HeliosError, InvalidRequestError, NotFoundError, UnsupportedMediaTypeError
from helios_serve.telemetry import Metrics

GENERATIONS = "/v1/videos/generations"
_EXAMPLE = {"prompt": "A lighthouse in a storm, waves breaking over the rocks", "num_frames": 33, "seed": 42}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TELEMETRY_OFF: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}


class NotAcceptableError(HeliosError):
    """The client accepts neither JSON nor MP4 (HTTP 406)."""

    status, grpc_status, code, retryable = 406, "INVALID_ARGUMENT", "not_acceptable", False


class RouteError(HeliosError):
    """No such route, or not with this method: what the framework itself refuses."""

    retryable = False

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message, code=code)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the HTTP surface needs beside the service. Without `metrics` it counts its requests in its own."""

    decoder: MediaDecoder
    version: str
    metrics: Metrics | None = None
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 64 * 2**20
    max_other_body_bytes: int = 2**20


def create_app(service: VideoService, settings: ServerSettings) -> FastAPI:
    """The ASGI application; its shutdown closes `service`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = _HeliosApp(
        title="helios_serve",
        version=settings.version,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_TELEMETRY_OFF,
    )
    metrics = Metrics(service.model.name) if settings.metrics is None else settings.metrics
    routes = _Routes(service, settings, metrics)
    app.add_api_route(
        GENERATIONS,
        routes.generate,
        methods=["POST"],
        summary="Generate a video and wait for it",
        response_model=schemas.Generation,
        responses={200: {"content": {"video/mp4": {}}}, **_error_answers(400, 404, 406, 413, 415, 500, 503, 504)},
        openapi_extra={"requestBody": _request_body()},
    )
    app.add_api_route(
        GENERATIONS, _only_post, methods=["GET", "HEAD", "PUT", "PATCH", "DELETE"], include_in_schema=False
    )
    _add_get(app, "/v1/videos/models", routes.models, schemas.ModelList)
    _add_get(app, "/v1/videos/{video_id}", routes.video, schemas.Video, 404)
    _add_get(app, "/v1/videos/{video_id}/content", routes.content, None, 400, 404, 409, 416)
    _add_get(app, "/v1/models", routes.models, schemas.ModelList)
    # A hub id holds a slash.
    _add_get(app, "/v1/models/{model_id:path}", routes.model, schemas.ModelItem, 404)
    _add_get(app, "/health", routes.health, None, 503)
    _add_get(app, "/ready", routes.health, None, 503)
    _add_get(app, "/live", routes.live, None)
    _add_get(app, "/version", routes.version, None)
    _add_metrics(app, routes.metrics)
    _add_error_handlers(app)
    app.add_middleware(
        BodyLimit,
        default_bytes=settings.max_other_body_bytes,
        bytes_by_path={GENERATIONS: settings.max_body_bytes},
    )
    app.add_middleware(RequestBoundary)
    app.add_middleware(RequestCount, metrics=metrics)
    return app


class _HeliosApp(FastAPI):
    """Adds the schema of the request body, which the route reads by hand, to the OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"].update(_body_schemas())
        return document


class _Routes:
    """The handlers: one method per route."""

    def __init__(self, service: VideoService, settings: ServerSettings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._media = Media(source=DataUriSource(), decoder=settings.decoder)
        self._created = int(time.time())

    async def generate(self, request: Request) -> Response:
        wants_mp4 = _wants_mp4(request)
        base_url = _base_url(request)
        parsed = await asyncio.to_thread(self._parse, await _read_body(request))
        job = self._service.create(parsed)
        video = await self._finish(request, job, detach=parsed.detach)
        if wants_mp4:
            return whole_video(video, _mp4_headers(job))
        item = await _item(job, video, parsed, base_url)
        return JSONResponse(generation_object(job, item).model_dump())

    async def video(self, request: Request, video_id: str) -> Response:
        job = self._service.get(video_id)
        headers = {"cache-control": "no-store"}
        if not job.finished.is_set():
            eta_ms = 8000.0 if job.eta_s is None else 1000 * job.eta_s
            headers["openai-poll-after-ms"] = str(round(min(5000.0, max(250.0, eta_ms / 8))))
        return JSONResponse(video_object(job, _base_url(request)).model_dump(), headers=headers)

    async def content(self, request: Request, video_id: str, variant: str = "video") -> Response:
        if variant != "video":
            raise InvalidRequestError(f"variant {shown(variant)}: only video", param="variant")
        video = self._service.content(video_id)
        return video_response(request, video, {"content-disposition": f'attachment; filename="{video_id}.mp4"'})

    async def models(self) -> Response:
        item = model_object(self._service.model, self._created, self._settings.limits)
        return JSONResponse(schemas.ModelList(object="list", data=[item]).model_dump())

    async def model(self, model_id: str) -> Response:
        served = self._service.model
        if model_id not in (served.name, *self._settings.limits.model_aliases):
            message = f"model {shown(model_id)}: not served here; served: {served.name}"
            raise NotFoundError(message, param="model", code="model_not_found")
        return JSONResponse(model_object(served, self._created, self._settings.limits).model_dump())

    async def health(self) -> Response:
        if self._service.is_ready():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not_ready", "reasons": ["the engine is not ready"]}, status_code=503)

    async def live(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def version(self) -> Response:
        return JSONResponse({"version": self._settings.version, "model": self._service.model.name})

    async def metrics(self, request: Request) -> Response:
        weights = _accept_weights(request, "text/plain", "application/openmetrics-text")
        wants_openmetrics = weights["application/openmetrics-text"] > weights["text/plain"]
        text, content_type = self._metrics.render(openmetrics=wants_openmetrics)
        return Response(text, headers={"content-type": content_type})

    def _parse(self, raw: bytes) -> ParsedRequest:
        """Runs in a thread: decoding a video takes long enough to stall every other client."""
        return parse_generation(_json_object(raw), self._service.model, self._media, self._settings.limits)

    async def _finish(self, request: Request, job: Job, *, detach: bool) -> StoredVideo:
        """Waits for the job. A client that leaves cancels it, unless it asked for `detach`."""
        finished = asyncio.ensure_future(self._service.wait(job))
        left = asyncio.ensure_future(_client_leaves(request))
        try:
            await asyncio.wait({finished, left}, return_when=asyncio.FIRST_COMPLETED)
            if not finished.done() and not detach:
                await self._service.cancel(job.id)
            return await finished
        finally:
            left.cancel()
            finished.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _only_post(request: Request) -> Response:
    raise HTTPException(405, headers={"allow": "POST"})


async def _read_body(request: Request) -> bytes:
    """Raises UnsupportedMediaTypeError unless the body is application/json."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaTypeError(f"content-type {shown(content_type)}: only application/json")
    return await request.body()


def _json_object(raw: bytes) -> dict[str, object]:
    """Raises InvalidRequestError `malformed_body` unless `raw` is a JSON object that can be written again."""
    try:
        body = json.loads(raw, object_pairs_hook=_object, parse_constant=_refuse_constant)
        if _SURROGATE.search(raw) is not None:
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise _malformed("nested too deeply") from None
    except UnicodeEncodeError:
        raise _malformed("a string has an unpaired surrogate") from None
    except ValueError as error:
        raise _malformed(str(error)[:200]) from None
    if not isinstance(body, dict):
        raise _malformed(f"it is {shown(body)}")
    return body


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _malformed(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"body: not a JSON object: {problem}", code="malformed_body")


def _base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def _wants_mp4(request: Request) -> bool:
    """Whether the Accept header prefers MP4; JSON wins a tie."""
    weights = _accept_weights(request, "application/json", "video/mp4")
    if not any(quality > 0 for quality, _ in weights.values()):
        accept = request.headers["accept"]
        raise NotAcceptableError(f"accept {shown(accept)}: only application/json and video/mp4", param="accept")
    return weights["video/mp4"] > weights["application/json"]


def _accept_weights(request: Request, *kinds: str) -> dict[str, tuple[float, bool]]:
    """How much the Accept header wants each media type: its quality, then whether it is named rather than matched."""
    accept = request.headers.get("accept", "*/*") or "*/*"
    weights = dict.fromkeys(kinds, (0.0, False))
    for entry in accept.split(","):
        media_range, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        for kind in kinds:
            if quality > 0 and media_range in ("*/*", kind, kind.split("/")[0] + "/*"):
                weights[kind] = max(weights[kind], (quality, media_range == kind))
    return weights


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


async def _item(job: Job, video: StoredVideo, parsed: ParsedRequest, base_url: str) -> schemas.GenerationItem:
    if parsed.response_format == "url":
        return schemas.GenerationItem(url=content_url(job, base_url), b64_json=None, revised_prompt=None)
    text = await asyncio.to_thread(lambda: base64.b64encode(video.path.read_bytes()).decode())
    return schemas.GenerationItem(url=None, b64_json=text, revised_prompt=None)


def _mp4_headers(job: Job) -> dict[str, str]:
    durations = {"queue": job.queue_ms, "first_segment": job.first_segment_ms, "total": job.total_ms}
    return {
        "x-video-id": job.id,
        "x-seed": str(job.request.params.seed),
        "server-timing": ", ".join(f"{name};dur={ms}" for name, ms in durations.items() if ms is not None),
        "content-disposition": f'inline; filename="{job.id}.mp4"',
    }


def _add_get(
    app: FastAPI, path: str, endpoint: Callable[..., Any], answer: type[Any] | None, *error_statuses: int
) -> None:
    """A GET route that answers HEAD too, which the framework does not do by itself."""
    app.add_api_route(path, endpoint, methods=["GET"], response_model=answer, responses=_error_answers(*error_statuses))
    app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)


def _add_metrics(app: FastAPI, endpoint: Callable[..., Any]) -> None:
    formats: dict[int | str, dict[str, Any]] = {200: {"content": {"application/openmetrics-text": {}}}}
    app.add_api_route("/metrics", endpoint, methods=["GET"], response_class=PlainTextResponse, responses=formats)
    app.add_api_route("/metrics", endpoint, methods=["HEAD"], include_in_schema=False)


def _error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorAnswer} for status in statuses}


def _request_body() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/GenerationBody"}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": _EXAMPLE}}}


def _body_schemas() -> dict[str, Any]:
    schema = schemas.GenerationBody.model_json_schema(ref_template="#/components/schemas/{model}")
    nested = schema.pop("$defs")
    return {"GenerationBody": schema, **nested}


def _add_error_handlers(app: FastAPI) -> None:
    async def helios_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HeliosError)
        if isinstance(error, RangeNotSatisfiableError):
            return error_response(error, {"content-range": f"bytes */{error.num_bytes}"})
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
