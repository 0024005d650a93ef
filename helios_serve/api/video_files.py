"""The finished file of a job and pictures of it, made from its segments when they are first wanted, then kept.

Knows blobs and segments; the muxer and the stills are given. Knows no caller and no protocol.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from helios_serve.api.job_view import JobViews
from helios_serve.api.jobs import JobSegment, StoredVideo
from helios_serve.errors import ConflictError, GenerationError, HeliosError
from helios_serve.store import records
from helios_serve.store.connect import Stores
from helios_serve.store.errors import BlobMissingError

logger = logging.getLogger(__name__)

Muxer = Callable[[bytes, Sequence[bytes]], bytes]
"""(init, media of all segments in order) -> a progressive MP4."""

Still = Literal["thumbnail", "spritesheet", "last_frame"]
Pixels = Literal["rgb24", "yuv420p"]
"""How pictures are laid out that are not encoded: interleaved, or a plane of luma and two of chroma."""
STILL_TYPES: dict[Still, str] = {"thumbnail": "image/webp", "spritesheet": "image/jpeg", "last_frame": "image/png"}
"""Pictures of a video, and their media types."""


class VideoExpiredError(HeliosError):
    """The video's time is over; its row is still there (HTTP 410)."""

    status, grpc_status, code, retryable = 410, "NOT_FOUND", "video_expired", False


class Stills(Protocol):
    """Takes pictures from segments."""

    def thumbnail(self, init: bytes, media: bytes) -> bytes:
        """WebP of a segment's first frame."""
        ...

    def last_frame(self, init: bytes, media: bytes) -> bytes:
        """PNG of a segment's last frame."""
        ...

    def spritesheet(self, init: bytes, media: Sequence[bytes], frames_per_tile: int) -> bytes:
        """JPEG of one frame in `frames_per_tile`."""
        ...

    def raw_frames(self, init: bytes, media: bytes, pixels: Pixels) -> bytes:
        """The pictures of a segment behind each other, row by row."""
        ...


class VideoFiles:
    """One for each service."""

    def __init__(self, stores: Stores, views: JobViews, muxer: Muxer, stills: Stills) -> None:
        self._stores = stores
        self._views = views
        self._muxer = muxer
        self._stills = stills
        self._muxing: dict[str, asyncio.Lock] = {}

    async def video(self, tenant: str, video_id: str) -> StoredVideo:
        """The finished video.

        Raises:
            NotFoundError: no such job.
            VideoExpiredError: its time is over.
            ConflictError: not finished, or failed.
        """
        row = await self._finished_row(tenant, video_id)
        key = row.video_blob
        try:
            if key is not None:
                return StoredVideo(key=key, num_bytes=await self._stores.blobs.verify(key))
        except BlobMissingError as error:  # it can be made again from the segments
            logger.warning("video %s: %s", video_id, error)
        return await self._assembled(tenant, video_id)

    async def still(self, tenant: str, video_id: str, variant: Still) -> tuple[bytes, str]:
        """A picture of a video, and its media type. The thumbnail is there with the first segment, the others at the
        end.

        Raises: NotFoundError, ConflictError, VideoExpiredError as `video` does.
        """
        if variant == "thumbnail":
            page = await self._stores.chunks.segments(tenant, video_id, 0, limit=1)
            if not page.chunks:
                await self._finished_row(tenant, video_id)
                raise GenerationError(f"video {video_id}: it has no segment", code="data_loss")
            first = await self._views.segment(page.job, page.chunks[0])
            return await asyncio.to_thread(self._stills.thumbnail, first.init, first.media), STILL_TYPES[variant]
        row = await self._finished_row(tenant, video_id)
        if variant == "last_frame":
            segments = await self._segments(tenant, row, start=max(0, row.next_chunk - 1))
            last = segments[-1]
            return await asyncio.to_thread(self._stills.last_frame, last.init, last.media), STILL_TYPES[variant]
        segments = await self._segments(tenant, row)
        media, a_second = [segment.media for segment in segments], max(1, round(segments[0].fps))
        picture = await asyncio.to_thread(self._stills.spritesheet, segments[0].init, media, a_second)
        return picture, STILL_TYPES[variant]

    async def raw(self, segment: JobSegment, pixels: Pixels) -> JobSegment:
        """A segment with its pictures, decoded, for its media; no init segment belongs to them."""
        data = await asyncio.to_thread(self._stills.raw_frames, segment.init, segment.media, pixels)
        return replace(segment, init=b"", media=data)

    async def _finished_row(self, tenant: str, video_id: str) -> records.Job:
        row = await self._stores.jobs.get(tenant, video_id)
        if row.is_expired:
            raise VideoExpiredError(f"video {row.id}: it has expired; its bytes are deleted")
        if row.state in ("failed", "cancelled"):
            raise ConflictError(f"video {row.id}: {row.state}: {row.error}", code="video_failed")
        if row.state != "finished":
            job = await self._views.get(tenant, video_id)
            raise ConflictError(f"video {row.id}: {job.state}, {job.progress} % done; its content comes at the end")
        return row

    async def _assembled(self, tenant: str, video_id: str) -> StoredVideo:
        """The file of a finished job, made from its segments unless it exists."""
        lock = self._muxing.setdefault(video_id, asyncio.Lock())
        try:
            async with lock:
                row = await self._stores.jobs.get(tenant, video_id)
                if row.video_blob is not None:
                    return StoredVideo(key=row.video_blob, num_bytes=await self._stores.blobs.verify(row.video_blob))
                segments = await self._segments(tenant, row)
                media = [segment.media for segment in segments]
                data = await asyncio.to_thread(self._muxer, segments[0].init, media)
                blob = await self._stores.blobs.put(data)
                await self._stores.jobs.attach_video(video_id, blob)
                return StoredVideo(key=blob.key, num_bytes=blob.num_bytes)
        finally:
            if not lock.locked():
                self._muxing.pop(video_id, None)

    async def _segments(self, tenant: str, row: records.Job, start: int = 0) -> list[JobSegment]:
        segments: list[JobSegment] = []
        while True:
            page = await self._stores.chunks.segments(tenant, row.id, start + len(segments))
            if not page.chunks:
                return segments
            segments += await self._views.segments(page.job, page.chunks)
