"""What a viewer of a running or finished job is sent: server-sent events, and progressive fMP4.

Turns the service's `JobEvent`s into bytes; starts and ends nothing. Init and media of the segments, joined in order,
are a valid MP4 at every prefix. Bytes leave in small pieces, so that what a slow reader holds beyond the segment, which
all viewers share, is one piece.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from pybase64 import b64encode
from pydantic_core import to_json

from helios_serve.api.jobs import (
    Job,
    JobEnded,
    JobEvent,
    JobProgress,
    JobSegment,
    Links,
    error_detail,
    generation_usage,
    video_object,
)
from helios_serve.api.mime import mime_type_of
from helios_serve.errors import CapacityError, HeliosError
from helios_serve.types import FRAMES_PER_CHUNK

KEEP_ALIVE_S = 15.0
PIECE_BYTES = 240 << 10
"""Of video that are given to a connection at once; a multiple of three, which base64 joins without a seam."""
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no", "accept-ranges": "none"}


def pacing(job: Job, generated_fps: float) -> dict[str, float]:
    """How a player avoids a stall (API.md 4.4): seconds to wait after the first segment, or the rate to play at."""
    params = job.request.params
    later = (params.num_chunks - 1) * FRAMES_PER_CHUNK
    return {
        "recommended_preroll_seconds": round(max(0.0, later * (1 / generated_fps - 1 / params.fps)), 3),
        "recommended_playback_rate": round(min(1.0, generated_fps / params.fps), 3),
    }


async def fmp4(events: AsyncGenerator[JobEvent, None]) -> AsyncIterator[bytes | memoryview]:
    """The segments as they come, the first one behind its init.

    Raises: the job's error after the last segment, so that the connection is cut rather than ended.
    """
    is_first = True
    async with aclosing(events):
        async for event in events:
            if isinstance(event, JobSegment):
                head, is_first = event.init if is_first else b"", False
                for piece in _pieces(event.media):
                    yield head + piece if head else piece
                    head = b""
            elif isinstance(event, JobEnded) and event.job.error is not None:
                raise event.job.error


class ServerSentEvents:
    """One viewer's events. `id` is 0 for created, k + 1 for segment k, N + 1 for the end: enough to resume anywhere."""

    def __init__(self, job: Job, generated_fps: float, links: Callable[[Job], Links]) -> None:
        self._job = job
        self._generated_fps = generated_fps
        self._links = links

    async def stream(self, events: AsyncGenerator[JobEvent | None, None], last_id: int | None) -> AsyncIterator[bytes]:
        """Everything after `last_id`, with a comment for each pause so that proxies keep the connection."""
        job = self._job
        if last_id is None:
            yield self._event("video_generation.created", self._created(), 0)
        async with aclosing(events):
            try:
                async for event in events:
                    if event is None:
                        yield b": ka\n\n"
                    elif isinstance(event, JobSegment):
                        if job.with_segments:
                            for piece in self._partial(event):
                                yield piece
                    elif isinstance(event, JobProgress):
                        yield self._event(*_progress(event))
                    elif event.job.error is None:
                        number = event.job.num_chunks + 1
                        yield self._event("video_generation.completed", self._completed(event.job), number)
                    else:
                        yield _error(event.job.error)
            except CapacityError:  # the server ends: the client comes back with the last id that it saw
                yield b"retry: 500\n\n"
            except HeliosError as error:  # deleted under the viewer's eyes
                yield _error(error)

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
            **pacing(job, self._generated_fps),
        }

    def _completed(self, job: Job) -> dict[str, Any]:
        video = video_object(job, self._links(job)).model_dump()
        usage = generation_usage(job).model_dump()
        return {"url": video["helios"]["urls"]["content"], "b64_json": None, "usage": usage, "video": video}

    def _partial(self, segment: JobSegment) -> Iterator[bytes]:
        """A segment's event, its base64 made as it is sent: it needs no escape in JSON."""
        event = self._event("video_generation.partial_video", _partial(segment), segment.index + 1)
        head, field, tail = event.partition(b'"b64_json":"')
        begin = head + field
        for piece in _pieces(segment.media if segment.index > 0 else segment.init + segment.media):
            yield begin + b64encode(piece)
            begin = b""
        yield tail

    def _event(self, kind: str, data: Mapping[str, Any], number: int | None = None) -> bytes:
        return _sse(kind, {"type": kind, "id": self._job.id, **data}, number)


def _pieces(data: bytes) -> Iterator[memoryview]:
    """Cut without a copy."""
    whole = memoryview(data)
    return (whole[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def _partial(segment: JobSegment) -> dict[str, Any]:
    """Without the segment's bytes."""
    return {
        "partial_video_index": segment.index,
        "b64_json": "",
        "start_frame": segment.start_frame,
        "num_frames": segment.num_frames,
        "pts_seconds": segment.start_frame / segment.fps,
        "duration": segment.num_frames / segment.fps,
        "prompt_weight": segment.prompt_weight,
        "mime_type": mime_type_of(segment.init),
    }


def _progress(event: JobProgress) -> tuple[str, dict[str, Any]]:
    job, cursor = event.job, event.cursor
    eta_s = None if job.eta_s is None else round(job.eta_s, 3)
    if cursor is None:
        return "video_generation.queued", {"queue_position": job.queue_position, "eta_seconds": eta_s}
    params = job.request.params
    return "video_generation.progress", {
        "progress": job.progress,
        "phase": event.phase,
        "chunk": cursor.chunk,
        "num_chunks": job.num_chunks,
        "stage": cursor.stage,
        "step": cursor.step,
        "num_steps": params.steps_in(cursor.chunk)[cursor.stage],
        "eta_seconds": eta_s,
    }


def _error(error: HeliosError) -> bytes:
    return _sse("error", {"error": error_detail(error).model_dump()}, None)


def _sse(kind: str, data: Mapping[str, Any], number: int | None) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return b"%sevent: %s\ndata: %s\n\n" % (head.encode(), kind.encode(), to_json(data))
