"""The routes that read jobs and end them: list, get, cancel, delete, content, events, stream."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from helios_serve.api import schemas
from helios_serve.api.content import client_has, redirect, video_response
from helios_serve.api.hls import hls_index, hls_init, hls_segment
from helios_serve.api.http_access import VIEWER_HEADERS
from helios_serve.api.http_request import last_event_id, page_of
from helios_serve.api.jobs import video_object
from helios_serve.api.names import shown
from helios_serve.api.pages import add_get, error_answers
from helios_serve.api.routes import VIDEOS, Desk
from helios_serve.api.streaming import KEEP_ALIVE_S, STREAM_HEADERS, ServerSentEvents, fmp4
from helios_serve.api.video_files import STILL_TYPES, VideoExpiredError
from helios_serve.errors import InvalidRequestError

PRESIGNED_S = 3600.0
"""How long an address in the blob store is good, as the tokens of this server are."""

_STREAM_HEADERS = {**STREAM_HEADERS, **VIEWER_HEADERS}
_REDIRECT = {302: {"description": "To the blob store, where the server is set to send clients there"}}


def add_video_routes(app: FastAPI, desk: Desk) -> None:
    """Registers the routes; after those whose paths `/v1/videos/{id}` would match."""
    routes = _Routes(desk)
    one = f"{VIDEOS}/{{video_id}}"
    add_get(app, VIDEOS, routes.videos, schemas.VideoList, 400, 404)
    add_get(app, one, routes.video, schemas.Video, 404)
    add_get(app, f"{one}/content", routes.content, None, 400, 404, 409, 410, 416, others=_REDIRECT)
    add_get(app, f"{one}/events", routes.events, None, 400, 404)
    add_get(app, f"{one}/stream", routes.stream, None, 400, 404, 410)
    add_get(app, f"{one}/hls/index.m3u8", routes.hls_index, None, 404, 409, 410, 503)
    add_get(app, f"{one}/hls/init.mp4", routes.hls_init, None, 404, 409, 410, 503)
    add_get(app, f"{one}/hls/seg{{index}}.m4s", routes.hls_segment, None, 404, 409, 410)
    app.add_api_route(
        one, routes.delete, methods=["DELETE"], response_model=schemas.VideoDeleted, responses=error_answers(404)
    )
    app.add_api_route(
        f"{one}/cancel", routes.cancel, methods=["POST"], response_model=schemas.Video, responses=error_answers(404)
    )


class _Routes:
    """The handlers: one method per route."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._service = desk.service

    async def videos(
        self,
        request: Request,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
        status: str | None = None,
    ) -> Response:
        caller = await self._desk.access.caller(request, "read")
        jobs, has_more = await self._service.list(caller, page_of(after, limit, order, status))
        links = self._desk.links(request)
        data = [video_object(job, links(job)) for job in jobs]
        answer = schemas.VideoList(
            object="list",
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )
        return JSONResponse(answer.model_dump())

    async def video(self, request: Request, video_id: str) -> Response:
        caller = await self._desk.access.caller(request, "read")
        return self._desk.video(request, await self._service.get(caller, video_id))

    async def cancel(self, request: Request, video_id: str) -> Response:
        caller = await self._desk.access.caller(request, "generate")
        return self._desk.video(request, await self._service.cancel(caller, video_id))

    async def delete(self, request: Request, video_id: str) -> Response:
        caller = await self._desk.access.caller(request, "generate")
        await self._service.delete(caller, video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    async def events(self, request: Request, video_id: str) -> Response:
        """Never cancels the job. `Last-Event-ID` is k + 1 for segment k."""
        caller = await self._desk.access.viewer(request, video_id, "events")
        job = await self._service.get(caller, video_id)
        last_id = last_event_id(request)
        fps = self._service.generated_fps(job.request.params)
        viewer = ServerSentEvents(job, fps, self._desk.links(request))
        body = viewer.stream(
            self._service.watch_or_pause(caller, video_id, last_id or 0, pause_s=KEEP_ALIVE_S), last_id
        )
        return StreamingResponse(body, headers=_STREAM_HEADERS, media_type="text/event-stream")

    async def stream(self, request: Request, video_id: str, from_segment: int = 0) -> Response:
        """Never cancels the job."""
        caller = await self._desk.access.viewer(request, video_id, "stream")
        job = await self._service.get(caller, video_id)
        if job.state == "expired":
            raise VideoExpiredError(f"video {job.id}: it has expired; its bytes are deleted")
        if not 0 <= from_segment < job.num_chunks:
            raise InvalidRequestError(
                f"from_segment {from_segment}: the video has {job.num_chunks} segments, from 0", param="from_segment"
            )
        body = fmp4(self._service.watch(caller, video_id, from_segment, with_steps=False))
        return StreamingResponse(body, headers=_STREAM_HEADERS, media_type="video/mp4")

    async def content(self, request: Request, video_id: str, variant: str = "video") -> Response:
        caller = await self._desk.access.viewer(request, video_id, "content")
        if variant in STILL_TYPES:
            body, media_type = await self._service.still(caller, video_id, variant)
            return Response(
                body, media_type=media_type, headers={"cache-control": "private, max-age=3600", **VIEWER_HEADERS}
            )
        if variant != "video":
            raise InvalidRequestError(
                f"variant {shown(variant)}: must be video, thumbnail, spritesheet or last_frame", param="variant"
            )
        video = await self._service.video(caller, video_id)
        # A presigned address is for GET alone.
        if self._desk.presign is not None and request.method == "GET" and not client_has(request, video):
            url = await self._desk.presign(video.key, PRESIGNED_S)
            if url is not None:
                return redirect(url, VIEWER_HEADERS)
        headers = {"content-disposition": f'attachment; filename="{video_id}.mp4"', **VIEWER_HEADERS}
        return video_response(request, video, self._service.read, headers)

    async def hls_index(self, request: Request, video_id: str) -> Response:
        caller = await self._desk.access.viewer(request, video_id, "hls")
        text = await hls_index(self._service, caller, video_id, request.query_params.get("token"))
        return Response(
            text, media_type="application/vnd.apple.mpegurl", headers={"cache-control": "no-store", **VIEWER_HEADERS}
        )

    async def hls_init(self, request: Request, video_id: str) -> Response:
        caller = await self._desk.access.viewer(request, video_id, "hls")
        return Response(await hls_init(self._service, caller, video_id), media_type="video/mp4")

    async def hls_segment(self, request: Request, video_id: str, index: int) -> Response:
        caller = await self._desk.access.viewer(request, video_id, "hls")
        return Response(await hls_segment(self._service, caller, video_id, index), media_type="video/iso.segment")
