"""The HTTP surface: routes, content types, status codes. Translates to `VideoService` and back, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from helios_serve.api import schemas
from helios_serve.api.content import RangeNotSatisfiableError, video_response, whole_video
from helios_serve.api.convert import Limits, ParsedRequest, parse_generation
from helios_serve.api.forms import FORM_TYPE, read_form
from helios_serve.api.http_request import (
    accept_weights,
    base_url_of,
    content_type_of,
    json_object,
    last_event_id,
    page_of,
    preferred_wait_s,
    read_body,
    wants_mp4,
)
from helios_serve.api.jobs import Job, StoredVideo, content_url, generation_object, model_object, video_object
from helios_serve.api.media_input import DataUriSource, Media, MediaDecoder
from helios_serve.api.middleware import BodyLimit, RequestBoundary, RequestCount, error_response
from helios_serve.api.names import shown
from helios_serve.api.playground import PlaygroundFile, playground_files, playground_headers
from helios_serve.api.service import STILL_TYPES, VideoService
from helios_serve.api.streaming import STREAM_HEADERS, ServerSentEvents, fmp4
from helios_serve.errors import HeliosError, InvalidRequestError, NotFoundError
from helios_serve.telemetry import Metrics

VIDEOS = "/v1/videos"
GENERATIONS = "/v1/videos/generations"
_EXAMPLE = {"prompt": "A lighthouse in a storm, waves breaking over the rocks", "num_frames": 33, "seed": 42}
_TELEMETRY_OFF: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}


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
    app.add_api_route(
        VIDEOS,
        routes.create,
        methods=["POST"],
        summary="Create a job",
        response_model=schemas.Video,
        responses=_error_answers(400, 404, 413, 415, 503),
        openapi_extra={"requestBody": _request_body()},
    )
    _add_get(app, VIDEOS, routes.videos, schemas.VideoList, 400, 404)
    _add_get(app, "/v1/videos/models", routes.models, schemas.ModelList)
    _add_get(app, "/v1/videos/{video_id}", routes.video, schemas.Video, 404)
    _add_get(app, "/v1/videos/{video_id}/content", routes.content, None, 400, 404, 409, 416)
    _add_get(app, "/v1/videos/{video_id}/events", routes.events, None, 400, 404)
    _add_get(app, "/v1/videos/{video_id}/stream", routes.stream, None, 400, 404)
    app.add_api_route(
        "/v1/videos/{video_id}",
        routes.delete,
        methods=["DELETE"],
        response_model=schemas.VideoDeleted,
        responses=_error_answers(404),
    )
    app.add_api_route(
        "/v1/videos/{video_id}/cancel",
        routes.cancel,
        methods=["POST"],
        response_model=schemas.Video,
        responses=_error_answers(404),
    )
    _add_get(app, "/v1/models", routes.models, schemas.ModelList)
    # A hub id holds a slash.
    _add_get(app, "/v1/models/{model_id:path}", routes.model, schemas.ModelItem, 404)
    _add_get(app, "/health", routes.health, None, 503)
    _add_get(app, "/ready", routes.health, None, 503)
    _add_get(app, "/live", routes.live, None)
    _add_get(app, "/version", routes.version, None)
    _add_metrics(app, routes.metrics)
    _add_playground(app)
    _add_error_handlers(app)
    app.add_middleware(
        BodyLimit,
        default_bytes=settings.max_other_body_bytes,
        bytes_by_path={GENERATIONS: settings.max_body_bytes, VIDEOS: settings.max_body_bytes},
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
        as_mp4 = wants_mp4(request)
        base_url = base_url_of(request)
        parsed = await self._parse(request)
        wait_s = 0.0 if parsed.is_async else preferred_wait_s(request)
        job = self._service.create(parsed)
        if parsed.stream:
            return self._streamed(request, job, parsed, as_mp4=as_mp4)
        if wait_s is not None and not await _ends_within(job, wait_s):
            return _accepted(job, base_url)
        video = await self._finish(request, job, detach=parsed.detach or wait_s is not None)
        if as_mp4:
            return whole_video(video, _mp4_headers(job))
        item = await _item(job, video, parsed, base_url)
        return JSONResponse(generation_object(job, item).model_dump())

    def _streamed(self, request: Request, job: Job, parsed: ParsedRequest, *, as_mp4: bool) -> Response:
        """Events, or live fMP4; a client that leaves cancels the job, unless it asked for `detach`."""
        events = self._service.watch(job)
        if as_mp4:
            body, media_type = fmp4(events), "video/mp4"
        else:
            viewer = ServerSentEvents(self._service, job, base_url_of(request))
            body, media_type = viewer.stream(events, None), "text/event-stream"
        headers = {**STREAM_HEADERS, "x-video-id": job.id, "x-seed": str(job.request.params.seed)}
        owned = body if parsed.detach else self._cancel_when_left(job, body)
        return StreamingResponse(owned, headers=headers, media_type=media_type)

    async def _cancel_when_left(self, job: Job, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for piece in body:
                yield piece
        finally:
            if not job.finished.is_set():
                await asyncio.shield(self._service.cancel(job.id))

    async def create(self, request: Request) -> Response:
        """A job, answered at once; the SDK wants 200."""
        base_url = base_url_of(request)
        parsed = await self._parse(request)
        if parsed.stream:
            raise InvalidRequestError(f"stream: only at {GENERATIONS}; watch a job at its events", param="stream")
        job = self._service.create(parsed)
        return JSONResponse(video_object(job, base_url).model_dump(), headers=_poll_headers(job))

    async def videos(
        self,
        request: Request,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
        status: str | None = None,
    ) -> Response:
        page = page_of(after, limit, order, status)
        jobs, has_more = self._service.list(page)
        data = [video_object(job, base_url_of(request)) for job in jobs]
        answer = schemas.VideoList(
            object="list",
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )
        return JSONResponse(answer.model_dump())

    async def cancel(self, request: Request, video_id: str) -> Response:
        job = await self._service.cancel(video_id)
        return JSONResponse(video_object(job, base_url_of(request)).model_dump())

    async def delete(self, video_id: str) -> Response:
        await self._service.delete(video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    async def events(self, request: Request, video_id: str) -> Response:
        """Never cancels the job. `Last-Event-ID` is k + 1 for segment k."""
        job = self._service.get(video_id)
        last_id = last_event_id(request)
        viewer = ServerSentEvents(self._service, job, base_url_of(request))
        body = viewer.stream(self._service.watch(job, last_id or 0), last_id)
        return StreamingResponse(body, headers=STREAM_HEADERS, media_type="text/event-stream")

    async def stream(self, video_id: str, from_segment: int = 0) -> Response:
        """Never cancels the job."""
        job = self._service.get(video_id)
        if not 0 <= from_segment < job.request.params.num_chunks:
            raise InvalidRequestError(
                f"from_segment {from_segment}: the video has {job.request.params.num_chunks} segments, from 0",
                param="from_segment",
            )
        body = fmp4(self._service.watch(job, from_segment))
        return StreamingResponse(body, headers=STREAM_HEADERS, media_type="video/mp4")

    async def video(self, request: Request, video_id: str) -> Response:
        job = self._service.get(video_id)
        return JSONResponse(video_object(job, base_url_of(request)).model_dump(), headers=_poll_headers(job))

    async def content(self, request: Request, video_id: str, variant: str = "video") -> Response:
        if variant in STILL_TYPES:
            body, media_type = await self._service.still(video_id, variant)
            return Response(body, media_type=media_type, headers={"cache-control": "private, max-age=3600"})
        if variant != "video":
            raise InvalidRequestError(
                f"variant {shown(variant)}: must be video, thumbnail, spritesheet or last_frame", param="variant"
            )
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
        weights = accept_weights(request, "text/plain", "application/openmetrics-text")
        wants_openmetrics = weights["application/openmetrics-text"] > weights["text/plain"]
        text, content_type = self._metrics.render(openmetrics=wants_openmetrics)
        return Response(text, headers={"content-type": content_type})

    async def _parse(self, request: Request) -> ParsedRequest:
        """JSON and forms alike; in a thread, as decoding a video takes long enough to stall every other client."""
        form = await read_form(request) if content_type_of(request) == FORM_TYPE else None
        raw = b"" if form is not None else await read_body(request)

        def parse() -> ParsedRequest:
            body = json_object(raw) if form is None else form
            return parse_generation(body, self._service.model, self._media, self._settings.limits)

        return await asyncio.to_thread(parse)

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


def _poll_headers(job: Job) -> dict[str, str]:
    """When to ask for an unfinished job again."""
    headers = {"cache-control": "no-store"}
    if not job.finished.is_set():
        eta_ms = 8000.0 if job.eta_s is None else 1000 * job.eta_s
        headers["openai-poll-after-ms"] = str(round(min(5000.0, max(250.0, eta_ms / 8))))
    return headers


def _accepted(job: Job, base_url: str) -> Response:
    """202: the job goes on without its caller."""
    body = {**video_object(job, base_url).model_dump(), "request_id": job.id}
    headers = {**_poll_headers(job), "location": f"/v1/videos/{job.id}", "preference-applied": "respond-async"}
    return JSONResponse(body, status_code=202, headers=headers)


async def _ends_within(job: Job, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await job.finished.wait()
    except TimeoutError:
        return False
    return True


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _only_post(request: Request) -> Response:
    raise HTTPException(405, headers={"allow": "POST"})


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


def _add_metrics(app: FastAPI, endpoint: Callable[..., Any]) -> None:
    formats: dict[int | str, dict[str, Any]] = {200: {"content": {"application/openmetrics-text": {}}}}
    app.add_api_route("/metrics", endpoint, methods=["GET"], response_class=PlainTextResponse, responses=formats)
    app.add_api_route("/metrics", endpoint, methods=["HEAD"], include_in_schema=False)


def _error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorAnswer} for status in statuses}


def _request_body() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/GenerationBody"}
    content = {"application/json": {"schema": schema, "example": _EXAMPLE}, FORM_TYPE: {"schema": schema}}
    return {"required": True, "content": content}


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
