"""The jobs of the contract fake: their state, their credit, their prompts and their real segments.

Everything but the encoding is on the event loop. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from starlette.websockets import WebSocket, WebSocketDisconnect

from helios_serve.types import FRAMES_PER_CHUNK
from helios_serve.workers.segment import SegmentSpec, encode_segment

from .pictures import render_frames, yuv420

Json = dict[str, Any]
Encoded = tuple[bytes, bytes]  # init, media


@dataclass(kw_only=True)
class Behaviour:
    """How the fake serves, and what goes wrong."""

    segment_seconds: float = 0.25  # time to make one chunk
    api_key: str | None = None
    has_websocket: bool = True
    cut_after_segment: int | None = None  # closes the socket once, after this segment, as a restarting server does
    sends_mime_type: bool = True
    playback_rate: float = 1.0
    variant: str = "distilled"


class ApiError(Exception):
    """An answer of the error catalogue."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}


@dataclass(kw_only=True)
class Change:
    """A prompt change: `chunk` is where it took over, None while it waits."""

    event_id: str
    prompt: str
    transition_chunks: int
    chunk: int | None = None


@dataclass(kw_only=True)
class Job:
    """A job and its state; everything is on the event loop."""

    id: str
    prompt: str
    size: tuple[int, int]
    fps: float
    num_frames: int | None  # None: open-ended
    seed: int
    steps: list[int]
    max_ahead: int | None = None  # None: not a session, needs no credit
    playback_rate: float = 1.0
    created_at: int = field(default_factory=lambda: int(time.time()))
    init: bytes = b""
    media: list[bytes] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # of each segment
    acked: int = -1
    max_lead: int = 0  # most segments ever made past the last one acknowledged
    is_paused: bool = False
    is_stopped: bool = False
    is_connected: bool = True
    status: str = "queued"
    error: Json | None = None
    denoising: int = 0  # the chunk in work
    changes: list[Change] = field(default_factory=list)
    socket: WebSocket | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # a segment's two frames go out without a break
    extended_from: str | None = None
    warnings: list[Json] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")

    @property
    def num_chunks(self) -> int | None:
        return None if self.num_frames is None else -(-self.num_frames // FRAMES_PER_CHUNK)

    def start_frame(self, segment: int) -> int:
        return sum(self.frames[:segment])


async def segments_of(job: Job, first: int) -> AsyncIterator[int]:
    """The indices of the segments from `first` on, each when it is made, until the job has ended."""
    segment = first
    while await _has_segment(job, segment):
        yield segment
        segment += 1


async def _has_segment(job: Job, segment: int) -> bool:
    """Waits for the segment; false when the job has ended without it."""
    async with job.changed:
        await job.changed.wait_for(lambda: segment < len(job.media) or job.is_over)
    return segment < len(job.media)


async def tell(job: Job, message: Json) -> None:
    if job.socket is not None:
        try:
            async with job.sending:
                await job.socket.send_json(message)
        except (RuntimeError, WebSocketDisconnect):
            job.is_connected = False


def may_generate(job: Job) -> bool:
    if job.max_ahead is None:
        return True
    return job.is_connected and not job.is_paused and len(job.media) - 1 - job.acked < job.max_ahead


def progress_of(job: Job) -> int:
    return round(100 * len(job.media) / job.num_chunks) if job.num_chunks else 0


def prompts_at(job: Job, segment: int) -> tuple[str, str, float]:
    """The prompts in effect at a chunk, and the weight of the newer one."""
    applied = [change for change in job.changes if change.chunk is not None and change.chunk <= segment]
    if not applied:
        return job.prompt, job.prompt, 1.0
    newest = applied[-1]
    assert newest.chunk is not None
    old = applied[-2].prompt if len(applied) > 1 else job.prompt
    return old, newest.prompt, min(1.0, (segment - newest.chunk + 1) / max(1, newest.transition_chunks))


@lru_cache(maxsize=256)
def encode(prompts: tuple[str, str, float], spec: SegmentSpec, segment: int, start: int, count: int) -> Encoded:
    pictures = render_frames(prompts, start, count, (spec.width, spec.height))
    return encode_segment(yuv420(pictures), spec, segment, start)


def spec_of(job: Job) -> SegmentSpec:
    return SegmentSpec(width=job.size[0], height=job.size[1], fps=job.fps, crf=20, codec="h264")


def picture(job: Job, frame: int, kind: str) -> bytes:
    picture = render_frames(prompts_at(job, frame // FRAMES_PER_CHUNK), frame, 1, job.size)[0]
    output = io.BytesIO()
    Image.fromarray((picture * 255).astype(np.uint8)).save(output, kind)
    return output.getvalue()
