"""The routes that make videos: generate, create, remix, extend; and those that this model has no answer for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pybase64 import b64encode
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from helios_serve.api import schemas
from helios_serve.api.auth import Caller
from helios_serve.api.content import whole_video
from helios_serve.api.convert import ParsedRequest
from helios_serve.api.extension import Look, own_video, parse_extension, parse_remix
from helios_serve.api.forms import FORM_TYPE
from helios_serve.api.http_request import origin_of, preferred_wait_s, read_timeout_s, wants_mp4
from helios_serve.api.jobs import Created, Job, StoredVideo, generation_object, video_object
from helios_serve.api.pages import error_answers
from helios_serve.api.routes import GENERATIONS, VIDEOS, Desk, poll_headers
from helios_serve.api.service import Attachment
from helios_serve.api.streaming import KEEP_ALIVE_S, STREAM_HEADERS, ServerSentEvents, fmp4
from helios_serve.errors import InvalidRequestError, UnsupportedOperationError

SYNC = "/v1/videos/sync"
_EXAMPLE = {"prompt": "A lighthouse in a storm, waves breaking over the rocks", "num_frames": 33, "seed": 42}


def add_generation_routes(app: FastAPI, desk: Desk) -> None:
    """Registers the routes; before any that match `/v1/videos/{id}`."""
    routes = _Routes(desk)
    body = {"requestBody": _request_body(_EXAMPLE, "GenerationBody")}
    errors = error_answers(400, 404, 406, 413, 415, 422, 500, 503, 504, 507)
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"video/mp4": {}, "text/event-stream": {}}},
        202: {"model": schemas.Video},
        **errors,
    }
    app.add_api_route(
        GENERATIONS,
        routes.generate,
        methods=["POST"],
        summary="Generate a video and wait for it",
        response_model=schemas.Generation,
        responses=answers,
        openapi_extra=body,
    )
    app.add_api_route(SYNC, routes.generate_mp4, methods=["POST"], include_in_schema=False)
    for path in (GENERATIONS, SYNC, f"{VIDEOS}/extensions", f"{VIDEOS}/edits", f"{VIDEOS}/characters"):
        app.add_api_route(path, _only_post, methods=["GET", "HEAD", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    app.add_api_route(
        VIDEOS,
        routes.create,
        methods=["POST"],
        summary="Create a job",
        response_model=schemas.Video,
        responses=errors,
        openapi_extra=body,
    )
    app.add_api_route(
        f"{VIDEOS}/extensions",
        routes.extend,
        methods=["POST"],
        summary="Continue a video",
        response_model=schemas.Video,
        responses={**errors, **error_answers(409, 501)},
        openapi_extra={"requestBody": _request_body(None, "ExtensionBody", "InputExtensionBody")},
    )
    app.add_api_route(
        f"{VIDEOS}/{{video_id}}/remix",
        routes.remix,
        methods=["POST"],
        summary="Make a video again under another prompt",
        response_model=schemas.Video,
        responses={**errors, **error_answers(409)},
        openapi_extra={"requestBody": _request_body(None, "RemixBody")},
    )
    for path, methods in (
        ("edits", ["POST"]),
        ("characters", ["POST"]),
        ("characters/{character_id}", ["GET", "HEAD"]),
    ):
        app.add_api_route(f"{VIDEOS}/{path}", _unsupported, methods=methods, include_in_schema=False)


class _Routes:
    """The handlers: one method per route."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._service = desk.service

    async def generate(self, request: Request) -> Response:
        return await self._generate(request, as_mp4=wants_mp4(request))

    async def generate_mp4(self, request: Request) -> Response:
        return await self._generate(request, as_mp4=True)

    async def _generate(self, request: Request, *, as_mp4: bool) -> Response:
        caller = await self._desk.access.caller(request, "generate")
        parsed = await self._desk.parsed(await self._desk.body(request), caller)
        wait_s = 0.0 if parsed.is_async else preferred_wait_s(request)
        if wait_s is None and not parsed.stream:
            parsed = replace(parsed, patience_s=self._patience_s(request, parsed))
        created = await self._service.create(caller, parsed, origin_of(request, "generate"))
        job, headers = created.job, _created_headers(created)
        if parsed.stream:
            return self._streamed(request, caller, created, parsed, as_mp4=as_mp4)
        if wait_s is not None:
            try:
                async with asyncio.timeout(wait_s):
                    await self._service.wait(caller, job.id)
            except TimeoutError:
                return self._accepted(request, await self._service.get(caller, job.id), headers)
        job = await self._finished(request, caller, created, detach=parsed.detach or wait_s is not None)
        if job.error is not None:
            raise job.error
        video = await self._service.video(caller, job.id)
        if as_mp4:
            return whole_video(video, self._service.read, {**_mp4_headers(job), **headers})
        item = await self._item(request, job, video, parsed)
        return JSONResponse(generation_object(job, item).model_dump(), headers=headers)

    def _patience_s(self, request: Request, parsed: ParsedRequest) -> float | None:
        """How long the client waits, if it says so; refuses what it would give up on if that ran at once."""
        limit_s, params = read_timeout_s(request), parsed.request.params
        needed_s = params.num_output_frames / self._service.generated_fps(params)
        if limit_s is not None and needed_s > limit_s:
            raise InvalidRequestError(
                f"num_frames {params.num_output_frames}: takes about {needed_s:.0f} s, and this client waits "
                f"{limit_s:.0f} s; send Prefer: respond-async, or stream",
                code="sync_too_long",
            )
        return limit_s

    def _streamed(
        self, request: Request, caller: Caller, created: Created, parsed: ParsedRequest, *, as_mp4: bool
    ) -> Response:
        """Events, or live fMP4; a client that leaves cancels the job, unless it asked for `detach`."""
        job = created.job
        if as_mp4:
            body, media_type = fmp4(self._service.watch(caller, job.id, with_steps=False)), "video/mp4"
        else:
            fps = self._service.generated_fps(job.request.params)
            events = self._service.watch_or_pause(caller, job.id, pause_s=KEEP_ALIVE_S)
            body = ServerSentEvents(job, fps, self._desk.links(request)).stream(events, None)
            media_type = "text/event-stream"
        if not parsed.detach:
            body = _attached(self._service.attach(job.id), body, is_guest=created.is_replayed)
        headers = {**STREAM_HEADERS, "x-video-id": job.id, "x-seed": str(job.request.params.seed)}
        return StreamingResponse(body, headers={**headers, **_created_headers(created)}, media_type=media_type)

    def _accepted(self, request: Request, job: Job, headers: dict[str, str]) -> Response:
        """202: the job goes on without its caller."""
        body = {**video_object(job, self._desk.links(request)(job)).model_dump(), "request_id": job.id}
        own = {"location": f"{VIDEOS}/{job.id}", "preference-applied": "respond-async"}
        return JSONResponse(body, status_code=202, headers={**poll_headers(job), **own, **headers})

    async def _finished(self, request: Request, caller: Caller, created: Created, *, detach: bool) -> Job:
        """Waits for the job. A client that leaves cancels it, unless it asked for `detach`."""
        video_id = created.job.id
        async with self._service.attach(video_id) as attachment:
            if detach or created.is_replayed:
                attachment.keep()
            finished = asyncio.ensure_future(self._service.wait(caller, video_id))
            left = asyncio.ensure_future(_client_leaves(request))
            try:
                await asyncio.wait({finished, left}, return_when=asyncio.FIRST_COMPLETED)
                if not finished.done():
                    if not (detach or created.is_replayed):
                        await self._service.cancel(caller, video_id)
                    raise ClientDisconnect
                return await finished
            finally:
                left.cancel()
                finished.cancel()

    async def create(self, request: Request) -> Response:
        """A job, answered at once; the SDK wants 200."""
        caller = await self._desk.access.caller(request, "generate")
        parsed = await self._desk.parsed(await self._desk.body(request), caller)
        _check_no_stream(parsed)
        created = await self._service.create(caller, parsed, origin_of(request, "create"))
        return self._desk.video(request, created.job, _created_headers(created))

    async def remix(self, request: Request, video_id: str) -> Response:
        caller = await self._desk.access.caller(request, "generate")
        prompt = parse_remix(await self._desk.body(request))
        created = await self._service.remix(caller, video_id, prompt, origin_of(request, "remix"))
        return self._desk.video(request, created.job, _created_headers(created))

    async def extend(self, request: Request) -> Response:
        caller = await self._desk.access.caller(request, "generate")
        body, origin = await self._desk.body(request), origin_of(request, "extend")
        if await self._continues_own(caller, body):
            video_id, own = parse_extension(body, self._service.model, self._desk.settings.limits)
            created = await self._service.extend(caller, video_id, own, origin)
        else:
            extension = await self._desk.parsed_input_extension(body, caller)
            _check_no_stream(extension.parsed)
            created = await self._service.extend_input(caller, extension, origin)
        return self._desk.video(request, created.job, _created_headers(created))

    async def _continues_own(self, caller: Caller, body: Mapping[str, object]) -> bool:
        """Whether an extension goes on with a video of this server as it is, without decoding it."""
        named = own_video(body)
        if named is None:
            return False
        video_id, look = named
        return look == Look() or look.fits((await self._service.get(caller, video_id)).request.params)

    async def _item(
        self, request: Request, job: Job, video: StoredVideo, parsed: ParsedRequest
    ) -> schemas.GenerationItem:
        if parsed.response_format == "url":
            url = self._desk.links(request)(job).content
            return schemas.GenerationItem(url=url, b64_json=None, revised_prompt=None)
        data = b"".join([piece async for piece in self._service.read(video)])
        text = await asyncio.to_thread(lambda: b64encode(data).decode())
        return schemas.GenerationItem(url=None, b64_json=text, revised_prompt=None)


def _check_no_stream(parsed: ParsedRequest) -> None:
    if parsed.stream:
        raise InvalidRequestError(f"stream: only at {GENERATIONS}; watch a job at its events", param="stream")


async def _attached(
    attaching: AbstractAsyncContextManager[Attachment], body: AsyncIterator[bytes | memoryview], *, is_guest: bool
) -> AsyncIterator[bytes | memoryview]:
    async with attaching as attachment:
        if is_guest:
            attachment.keep()
        async for piece in body:
            yield piece


def _created_headers(created: Created) -> dict[str, str]:
    headers = {} if created.budget is None else created.budget.headers()
    return {**headers, "idempotent-replayed": "true"} if created.is_replayed else headers


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _only_post(request: Request) -> Response:
    raise HTTPException(405, headers={"allow": "POST"})


async def _unsupported(request: Request) -> Response:
    what = request.url.path.split("/")[3]
    raise UnsupportedOperationError(f"{what}: Helios has no such conditioning; use prompts, an image or a video")


def _mp4_headers(job: Job) -> dict[str, str]:
    timing = job.timing
    durations = {"queue": timing.queue_ms, "first_segment": timing.first_segment_ms, "total": timing.total_ms}
    return {
        "x-video-id": job.id,
        "x-seed": str(job.request.params.seed),
        "server-timing": ", ".join(f"{name};dur={ms}" for name, ms in durations.items() if ms is not None),
        "content-disposition": f'inline; filename="{job.id}.mp4"',
    }


def _request_body(example: dict[str, Any] | None, *names: str) -> dict[str, Any]:
    schemas_of = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    schema: dict[str, Any] = schemas_of[0] if len(names) == 1 else {"anyOf": schemas_of}
    json_type: dict[str, Any] = {"schema": schema}
    if example is not None:
        json_type["example"] = example
    return {"required": True, "content": {"application/json": json_type, FORM_TYPE: {"schema": schema}}}
