"""HTTP Live Streaming of a running or finished job: its playlist, and the segments as the files that it names.

Knows the format and how long a player may be kept waiting; encodes nothing and knows no route.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from urllib.parse import quote

from helios_serve.api.auth import Caller
from helios_serve.api.jobs import Job, JobEnded, JobSegment
from helios_serve.api.service import VideoService
from helios_serve.api.video_files import VideoExpiredError
from helios_serve.errors import CapacityError, ConflictError, NotFoundError
from helios_serve.types import FRAMES_PER_CHUNK

PLAYLIST_TYPE = "application/vnd.apple.mpegurl"
INIT_TYPE = "video/mp4"
SEGMENT_TYPE = "video/iso.segment"

MIN_SEGMENTS = 3
"""Of a playlist that still grows: Chromium cannot parse a shorter one."""

HOLD_S = 30.0
RETRY_AFTER_S = 2.0


def playlist(job: Job, token: str | None) -> str:
    """The media playlist of the segments that can be read now; each entry carries `token`, if there is one."""
    fps = job.request.params.fps
    query = "" if token is None else f"?token={quote(token, safe='')}"
    lines = [
        "#EXTM3U",
        "#EXT-X-VERSION:7",
        f"#EXT-X-TARGETDURATION:{math.ceil(FRAMES_PER_CHUNK / fps)}",
        "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-PLAYLIST-TYPE:EVENT",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        f'#EXT-X-MAP:URI="init.mp4{query}"',
    ]
    for index in range(job.chunks_done):
        num_frames = min(FRAMES_PER_CHUNK, job.num_frames - FRAMES_PER_CHUNK * index)
        lines += [f"#EXTINF:{num_frames / fps:.6f},", f"seg{index}.m4s{query}"]
    if job.has_ended:
        lines.append("#EXT-X-ENDLIST")
    return "\n".join(lines) + "\n"


async def hls_index(
    service: VideoService, caller: Caller, video_id: str, token: str | None, hold_s: float = HOLD_S
) -> str:
    """The playlist, as soon as it has three segments or the job has ended.

    Raises:
        NotFoundError: no such job.
        CapacityError: `video_not_ready`, neither came within `hold_s` seconds; ask again.
        ConflictError: the job ended without a segment.
        VideoExpiredError: its time is over.
    """
    job = await service.get(caller, video_id)
    if not job.has_ended and job.chunks_done < MIN_SEGMENTS:
        try:
            async with asyncio.timeout(hold_s):
                await _segment_or_end(service, caller, video_id, MIN_SEGMENTS - 1)
        except TimeoutError:
            message = f"video {video_id}: {job.state}; its playlist comes with the third segment, or at the end"
            raise CapacityError(message, code="video_not_ready", retry_after_s=RETRY_AFTER_S) from None
        job = await service.get(caller, video_id)
    _check_readable(job)
    return playlist(job, token)


async def hls_init(service: VideoService, caller: Caller, video_id: str) -> bytes:
    """What a player reads before any segment: ftyp and moov.

    Raises: as `hls_segment`.
    """
    return (await _segment(service, caller, video_id, 0)).init


async def hls_segment(service: VideoService, caller: Caller, video_id: str, index: int) -> bytes:
    """Segment `index`: moof and mdat.

    Raises: NotFoundError, also for a segment that is not there yet; ConflictError when the job ended without any;
        VideoExpiredError.
    """
    return (await _segment(service, caller, video_id, index)).media


async def _segment(service: VideoService, caller: Caller, video_id: str, index: int) -> JobSegment:
    job = await service.get(caller, video_id)
    _check_readable(job)
    segment = await _segment_or_end(service, caller, video_id, index) if index < job.chunks_done else None
    if segment is None:
        raise NotFoundError(f"segment {index}: the video has {job.chunks_done} so far", param="segment")
    return segment


async def _segment_or_end(service: VideoService, caller: Caller, video_id: str, index: int) -> JobSegment | None:
    """Segment `index` as soon as it is there; None when the job ends without it."""
    async with aclosing(service.watch(caller, video_id, index, with_steps=False)) as events:
        async for event in events:
            if isinstance(event, JobSegment):
                return event
            if isinstance(event, JobEnded):
                return None
    return None


def _check_readable(job: Job) -> None:
    if job.state == "expired":
        raise VideoExpiredError(f"video {job.id}: it has expired; its bytes are deleted")
    if job.has_ended and job.chunks_done == 0:
        why = job.state if job.error is None else f"{job.state}: {job.error.message}"
        raise ConflictError(f"video {job.id}: {why}; it has no segment", code="video_failed")
