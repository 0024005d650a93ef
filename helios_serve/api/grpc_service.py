"""The methods of `helios.video.v1.VideoGenerationService` but `Session`: messages to `VideoService` and back.

Knows callers and jobs; knows no status code and no metadata.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from helios_serve.api.auth import Caller
from helios_serve.api.content import RangeNotSatisfiableError
from helios_serve.api.convert import Limits, ParsedRequest
from helios_serve.api.extension import parse_extension, parse_remix
from helios_serve.api.grpc_boundary import Call, Method, StreamMethod, UnaryMethod, undone_if_left
from helios_serve.api.grpc_convert import (
    check_nothing_beside,
    generation_body,
    named,
    named_as_in_proto,
    page_of,
    still_of,
    whole_seconds_of,
)
from helios_serve.api.grpc_messages import (
    Opening,
    model_message,
    progress_message,
    segment_messages,
    video_message,
    videos_that_fit,
)
from helios_serve.api.grpc_output import Output, output_of
from helios_serve.api.jobs import Created, Job, JobProgress, JobSegment, Origin, model_object
from helios_serve.api.limits import Limiter
from helios_serve.api.proto.helios.video.v1 import video_generation_pb2 as pb
from helios_serve.api.sampling import ParameterWarning
from helios_serve.api.service import VideoService
from helios_serve.api.sub_segments import WHEN_SENT
from helios_serve.errors import HeliosError, InvalidRequestError

PIECE_BYTES = 768 << 10
"""Of a download, in each message but the last."""

Parse = Callable[[Mapping[str, object], Caller], Awaitable[ParsedRequest]]
"""Validates the JSON form of a request in a caller's name."""

Viewed = TypeVar("Viewed", pb.GenerateResponse, pb.WatchVideoResponse)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcDesk:
    """What the gRPC surface translates to. parsed, parsed_live: validate a request, and one that is watched while it is
    made. content_url: the signed address of a finished video by its id; None where HTTP is not offered."""

    service: VideoService
    parsed: Parse
    parsed_live: Parse
    limiter: Limiter
    limits: Limits = field(default_factory=Limits)
    content_url: Callable[[str], str] | None = None

    def video(self, job: Job, num_bytes: int | None = None) -> pb.Video:
        """A job with the address of its bytes."""
        url = "" if self.content_url is None else self.content_url(job.id)
        return video_message(job, url=url, num_bytes=num_bytes)

    async def parsed_spec(
        self, call: Call, spec: pb.VideoSpec, more: Mapping[str, object], *, is_live: bool
    ) -> ParsedRequest:
        """A request, validated. Raises: InvalidRequestError, NotFoundError; ScopeError for raw frames."""
        output_of(spec.output, call.caller)
        parse = self.parsed_live if is_live else self.parsed
        parsed = await parse({**generation_body(spec), **more}, call.caller)
        if not spec.output.sub_chunks:
            return parsed
        told = ParameterWarning(param="spec.output.sub_chunks", message=WHEN_SENT)
        return replace(parsed, warnings=(*parsed.warnings, told))


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What a viewer wants of a job: segments from `start` on, if they are `is_inline`."""

    start: int = 0
    is_inline: bool
    output: Output = field(default_factory=Output)


class GrpcMethods:
    """One for each server."""

    def __init__(self, desk: GrpcDesk) -> None:
        self._desk = desk
        self._service = desk.service
        self._created = int(time.time())

    def table(self) -> dict[str, Method]:
        """The methods by their name in the proto, with the scope that each wants."""
        return {
            "Generate": StreamMethod(scope="generate", answer=self.generate, takes_media=True),
            "CreateVideo": UnaryMethod(scope="generate", answer=self.create, takes_media=True),
            "GetVideo": UnaryMethod(scope="read", answer=self.get),
            "ListVideos": UnaryMethod(scope="read", answer=self.list),
            "CancelVideo": UnaryMethod(scope="generate", answer=self.cancel),
            "DeleteVideo": UnaryMethod(scope="generate", answer=self.delete),
            "WatchVideo": StreamMethod(scope="read", answer=self.watch),
            "DownloadVideo": StreamMethod(scope="read", answer=self.download),
            "ListModels": UnaryMethod(scope="read", answer=self.models),
        }

    # Calls that last.

    async def generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        """A job from its making to its end. A client that leaves cancels it, unless it asked for `detach`."""
        is_inline = _is_inline(request.spec.output)
        with self._desk.limiter.stream(call.caller):
            created = await self._generated(request, call, is_live=is_inline)
            job = created.job
            async with self._service.attach(job.id) as attachment:
                if request.detach or created.is_replayed:
                    attachment.keep()
                view = _View(is_inline=is_inline, output=output_of(request.spec.output, call.caller))
                events = self._told(pb.GenerateResponse, call, job, view)
                try:
                    async with aclosing(events):
                        async for event in events:
                            yield event
                finally:
                    if call.ending is not None:
                        attachment.keep()

    async def _generated(self, request: pb.GenerateRequest, call: Call, *, is_live: bool) -> Created:
        """The job, made. A client that leaves meanwhile leaves none behind."""
        origin = _origin(call, "generate")

        async def undo(created: Created) -> None:
            if not (request.detach or created.is_replayed or call.ending is not None):
                await self._service.cancel(call.caller, created.job.id)

        with named_as_in_proto():
            more = {"detach": True} if request.detach else {}
            parsed = await self._desk.parsed_spec(call, request.spec, more, is_live=is_live)
            return await undone_if_left(self._service.create(call.caller, parsed, origin), undo)

    async def watch(self, request: pb.WatchVideoRequest, call: Call) -> AsyncGenerator[pb.WatchVideoResponse, None]:
        """A job from a segment on. Never cancels it."""
        is_inline = _is_inline(request)
        with self._desk.limiter.stream(call.caller):
            job = await self._service.get(call.caller, request.id)
            if not 0 <= request.from_segment <= job.num_chunks:
                raise InvalidRequestError(
                    f"from_segment {request.from_segment}: the video has {job.num_chunks} segments, from 0",
                    param="from_segment",
                )
            view = _View(start=request.from_segment, is_inline=is_inline)
            events = self._told(pb.WatchVideoResponse, call, job, view)
            async with aclosing(events):
                async for event in events:
                    yield event

    async def _told(self, kind: type[Viewed], call: Call, job: Job, view: _View) -> AsyncGenerator[Viewed, None]:
        """A job's events. Segments are read from the store as fast as the client takes them."""
        opening = Opening(is_raw=view.output.pixels is not None)
        fps = self._service.generated_fps(job.request.params)
        if not view.is_inline or job.chunks_done <= view.start:
            for accepted in opening.due(job, fps):
                yield kind(accepted=accepted)
        async with aclosing(self._service.watch(call.caller, job.id, view.start)) as events:
            async for event in events:
                if isinstance(event, JobSegment):
                    if not view.is_inline:
                        continue
                    for fragment in await view.output.fragments(event, self._service.raw):
                        for accepted in opening.due(job, fps, fragment.init):
                            yield kind(accepted=accepted)
                        for part in segment_messages(fragment):
                            yield kind(segment=part)
                    continue
                job = event.job
                for accepted in opening.due(job, fps):
                    yield kind(accepted=accepted)
                if isinstance(event, JobProgress):
                    yield kind(progress=progress_message(event))
                elif job.error is None:
                    yield kind(completed=await self._whole(call.caller, job))
                else:
                    yield kind(failed=self._desk.video(job))

    async def download(
        self, request: pb.DownloadVideoRequest, call: Call
    ) -> AsyncGenerator[pb.DownloadVideoResponse, None]:
        """Bytes of a finished video or of a picture of it, from `offset` on."""
        for name, value in (("offset", request.offset), ("limit", request.limit)):
            if value < 0:
                raise InvalidRequestError(f"{name} {value}: must not be negative", param=name)
        still = still_of(request.variant)
        if still is None:
            video = await self._service.video(call.caller, request.id)
            total, mime_type, etag = video.num_bytes, "video/mp4", video.etag
            end = _end_of(request, total)
            pieces = self._service.read(video, request.offset, end)
        else:
            data, mime_type = await self._service.still(call.caller, request.id, still)
            total, etag = len(data), f'"{hashlib.sha256(data).hexdigest()}"'
            end = _end_of(request, total)
            pieces = _only(data[request.offset : end])
        first = pb.DownloadVideoResponse(offset=request.offset, total_size=total, mime_type=mime_type, etag=etag)
        if request.offset == end:
            yield first
            return
        offset = request.offset
        async for piece in _in_pieces(pieces):
            message = pb.DownloadVideoResponse(offset=offset, data=piece, total_size=total)
            if offset == request.offset:
                message.MergeFrom(first)
            yield message
            offset += len(piece)

    # Calls that are answered at once.

    async def create(self, request: pb.CreateVideoRequest, call: Call) -> pb.CreateVideoResponse:
        """A job; it outlives the call."""
        if request.remix_video_id and request.extend_video_id:
            raise InvalidRequestError(
                "extend_video_id: not together with remix_video_id; give one of them",
                param="extend_video_id",
                code="conflicting_parameters",
            )
        with named_as_in_proto():
            if request.remix_video_id:
                created = await self._remixed(request, call)
            elif request.extend_video_id:
                created = await self._extended(request, call)
            else:
                more: dict[str, object] = {}
                if request.webhook_url:
                    more["webhook_url"] = request.webhook_url
                if request.HasField("expires_after"):
                    more["expires_after"] = whole_seconds_of(request.expires_after, "expires_after")
                if output_of(request.spec.output, call.caller).pixels is not None:
                    raise InvalidRequestError(
                        "output.container: a stored video is an MP4; raw frames come with Generate and Session",
                        param="output.container",
                    )
                parsed = await self._desk.parsed_spec(call, request.spec, more, is_live=False)
                created = await self._service.create(call.caller, parsed, _origin(call, "create"))
        return pb.CreateVideoResponse(video=self._desk.video(created.job))

    async def _remixed(self, request: pb.CreateVideoRequest, call: Call) -> Created:
        reason = "not beside remix_video_id; a remix keeps all but the prompt"
        check_nothing_beside(request, frozenset({"spec", "remix_video_id"}), "", reason)
        check_nothing_beside(request.spec, frozenset({"prompt"}), "spec.", reason)
        prompt = parse_remix({"prompt": request.spec.prompt})
        with named("id", "remix_video_id"):
            return await self._service.remix(call.caller, request.remix_video_id, prompt, _origin(call, "remix"))

    async def _extended(self, request: pb.CreateVideoRequest, call: Call) -> Created:
        reason = "not beside extend_video_id; an extension keeps all but the prompt and the length"
        check_nothing_beside(request, frozenset({"spec", "extend_video_id"}), "", reason)
        check_nothing_beside(request.spec, frozenset({"model", "prompt", "num_frames", "seconds"}), "spec.", reason)
        body = {**generation_body(request.spec), "video": {"id": request.extend_video_id}}
        video_id, extension = parse_extension(body, self._service.model, self._desk.limits)
        with named("id", "extend_video_id"):
            return await self._service.extend(call.caller, video_id, extension, _origin(call, "extend"))

    async def get(self, request: pb.GetVideoRequest, call: Call) -> pb.GetVideoResponse:
        job = await self._service.get(call.caller, request.id)
        return pb.GetVideoResponse(video=await self._whole(call.caller, job))

    async def list(self, request: pb.ListVideosRequest, call: Call) -> pb.ListVideosResponse:
        """A page; it may hold fewer videos than were asked for although more follow."""
        page = page_of(request)
        with named("after", "page_token"):
            jobs, has_more = await self._service.list(call.caller, page)
        shown = [job for job in jobs if page.states is None or job.state in page.states]
        videos = videos_that_fit([self._desk.video(job) for job in shown])
        is_cut = len(videos) < len(shown)
        last = jobs[-1].id if has_more else ""
        return pb.ListVideosResponse(videos=videos, next_page_token=videos[-1].id if is_cut else last)

    async def cancel(self, request: pb.CancelVideoRequest, call: Call) -> pb.CancelVideoResponse:
        job = await self._service.cancel(call.caller, request.id)
        return pb.CancelVideoResponse(video=self._desk.video(job))

    async def delete(self, request: pb.DeleteVideoRequest, call: Call) -> pb.DeleteVideoResponse:
        await self._service.delete(call.caller, request.id)
        return pb.DeleteVideoResponse(id=request.id, deleted=True)

    async def models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        item = model_object(self._service.model, self._created, self._desk.limits)
        return pb.ListModelsResponse(models=[model_message(item)])

    async def _whole(self, caller: Caller, job: Job) -> pb.Video:
        """A job, with the size of its file if that is made."""
        num_bytes = None
        if job.state == "completed":
            with suppress(HeliosError):
                num_bytes = (await self._service.video(caller, job.id)).num_bytes
        return self._desk.video(job, num_bytes)


def _origin(call: Call, route: str) -> Origin:
    return Origin(route=route, idempotency_key=call.headers.checked_key())


def _is_inline(message: pb.OutputOptions | pb.WatchVideoRequest) -> bool:
    """Whether segments are sent, which is so where nothing is said."""
    return message.inline_segments if message.HasField("inline_segments") else True


def _end_of(request: pb.DownloadVideoRequest, total: int) -> int:
    """Where a download ends. A client that has everything gets nothing more; beyond that there is nothing.

    Raises: RangeNotSatisfiableError.
    """
    if request.offset > total:
        raise RangeNotSatisfiableError(f"offset {request.offset}", total)
    return total if request.limit == 0 else min(total, request.offset + request.limit)


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _in_pieces(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, PIECE_BYTES at a time."""
    waiting = bytearray()
    async for piece in pieces:
        waiting += piece
        while len(waiting) > PIECE_BYTES:
            yield bytes(waiting[:PIECE_BYTES])
            del waiting[:PIECE_BYTES]
    if waiting:
        yield bytes(waiting)
