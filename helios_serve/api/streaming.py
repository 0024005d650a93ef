"""What a viewer of a running or finished job is sent: server-sent events, and progressive fMP4.

Turns the service's `JobEvent`s into bytes; starts and ends nothing. Init and media of the segments, joined in order,
are a valid MP4 at every prefix.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from helios_serve.api.jobs import Job, error_detail, generation_usage, video_object
from helios_serve.api.service import JobEnded, JobEvent, JobProgress, JobSegment, VideoService
from helios_serve.errors import HeliosError
from helios_serve.types import FRAMES_PER_CHUNK

KEEP_ALIVE_S = 15.0
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no", "accept-ranges": "none"}


def codec_of(init: bytes) -> str | None:
    """The RFC 6381 name of the codec in an init segment, read from its configuration box; None if it is not ours."""
    for kind in (b"avcC", b"vpcC", b"av1C"):
        at = init.find(kind)
        if at < 0:
            continue
        body = init[at + 4 :]
        if kind == b"avcC":
            return f"avc1.{body[1:4].hex()}"
        if kind == b"vpcC":
            profile, level, depth = body[4], body[5], body[6] >> 4
            return f"vp09.{profile:02d}.{level:02d}.{depth:02d}"
        tier = "H" if body[2] & 0x80 else "M"
        depth = 12 if body[2] & 0x20 else 10 if body[2] & 0x40 else 8
        return f"av01.{body[1] >> 5}.{body[1] & 31:02d}{tier}.{depth:02d}"
    return None


def mime_type_of(init: bytes) -> str:
    """The media type of a video with this init segment."""
    codec = codec_of(init)
    return "video/mp4" if codec is None else f'video/mp4; codecs="{codec}"'


def pacing(job: Job, generated_fps: float) -> dict[str, float]:
    """How a player avoids a stall (API.md 4.4): seconds to wait after the first segment, or the rate to play at."""
    params = job.request.params
    later = (params.num_chunks - 1) * FRAMES_PER_CHUNK
    return {
        "recommended_preroll_seconds": round(max(0.0, later * (1 / generated_fps - 1 / params.fps)), 3),
        "recommended_playback_rate": round(min(1.0, generated_fps / params.fps), 3),
    }


async def fmp4(events: AsyncGenerator[JobEvent, None]) -> AsyncIterator[bytes]:
    """The segments as they come, the first one behind its init.

    Raises: the job's error after the last segment, so that the connection is cut rather than ended.
    """
    is_first = True
    async with aclosing(events):
        async for event in events:
            if isinstance(event, JobSegment):
                yield (event.init if is_first else b"") + event.media
                is_first = False
            elif isinstance(event, JobEnded) and event.error is not None:
                raise event.error


class ServerSentEvents:
    """One viewer's events. `id` is 0 for created, k + 1 for segment k, N + 1 for the end: enough to resume anywhere."""

    def __init__(self, service: VideoService, job: Job, base_url: str) -> None:
        self._service = service
        self._job = job
        self._base_url = base_url

    async def stream(self, events: AsyncGenerator[JobEvent, None], last_id: int | None) -> AsyncIterator[bytes]:
        """Everything after `last_id`, with a comment now and then so that proxies keep the connection."""
        job = self._job
        if last_id is None:
            yield self._event("video_generation.created", self._created(), 0)
        async with aclosing(events):
            following = asyncio.ensure_future(anext(events, None))
            try:
                while True:
                    done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE_S)
                    if not done:
                        yield b": ka\n\n"
                        continue
                    event = following.result()
                    if event is None:
                        return
                    if isinstance(event, JobSegment):
                        if job.with_segments:
                            yield self._event("video_generation.partial_video", _partial(event), event.index + 1)
                    elif isinstance(event, JobProgress):
                        yield self._event(*_progress(job, event))
                    elif event.error is None:
                        yield self._event(
                            "video_generation.completed", self._completed(), job.request.params.num_chunks + 1
                        )
                    else:
                        yield _error(event.error)
                    following = asyncio.ensure_future(anext(events, None))
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    def _created(self) -> dict[str, Any]:
        job, params = self._job, self._job.request.params
        return {
            "model": job.model,
            "size": f"{params.width}x{params.height}",
            "fps": params.fps,
            "num_frames": params.num_output_frames,
            "num_chunks": params.num_chunks,
            "seed": params.seed,
            "mime_type": "video/mp4",
            "created_at": int(job.created_at),
            **pacing(job, self._service.generated_fps(params)),
        }

    def _completed(self) -> dict[str, Any]:
        video = video_object(self._job, self._base_url).model_dump()
        usage = generation_usage(self._job).model_dump()
        return {"url": video["helios"]["urls"]["content"], "b64_json": None, "usage": usage, "video": video}

    def _event(self, kind: str, data: Mapping[str, Any], number: int | None = None) -> bytes:
        return _sse(kind, {"type": kind, "id": self._job.id, **data}, number)


def _partial(segment: JobSegment) -> dict[str, Any]:
    return {
        "partial_video_index": segment.index,
        "b64_json": base64.b64encode((segment.init if segment.index == 0 else b"") + segment.media).decode(),
        "start_frame": segment.start_frame,
        "num_frames": segment.num_frames,
        "pts_seconds": segment.start_frame / segment.fps,
        "duration": segment.num_frames / segment.fps,
        "prompt_weight": segment.prompt_weight,
        "mime_type": mime_type_of(segment.init),
    }


def _progress(job: Job, event: JobProgress) -> tuple[str, dict[str, Any]]:
    if event.cursor is None:
        return "video_generation.queued", {"queue_position": None, "eta_seconds": None}
    params, cursor = job.request.params, event.cursor
    return "video_generation.progress", {
        "progress": job.progress,
        "phase": "denoise",
        "chunk": cursor.chunk,
        "num_chunks": params.num_chunks,
        "stage": cursor.stage,
        "step": cursor.step,
        "num_steps": params.steps_in(cursor.chunk)[cursor.stage],
        "eta_seconds": None if job.eta_s is None else round(job.eta_s, 3),
    }


def _error(error: HeliosError) -> bytes:
    return _sse("error", {"error": error_detail(error).model_dump()}, None)


def _sse(kind: str, data: Mapping[str, Any], number: int | None) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
