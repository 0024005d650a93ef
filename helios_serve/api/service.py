"""The verbs of the API over one engine: create, get, list, wait, watch, cancel, delete, content.

Keeps jobs in memory, segments and finished videos in a directory, all bounded. Knows no protocol, no model and no
codec: the engine makes segments and the muxer joins them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from helios_serve.api.convert import ParsedRequest
from helios_serve.api.jobs import Job, State, StoredSegment, StoredVideo, job_from
from helios_serve.errors import (
    CapacityError,
    ConflictError,
    GenerationError,
    HeliosError,
    InvalidRequestError,
    NotFoundError,
)
from helios_serve.types import (
    Completed,
    Event,
    Failure,
    ModelInfo,
    Progress,
    SamplingParams,
    Segment,
    SegmentReady,
    StepCursor,
    VideoRequest,
)

logger = logging.getLogger(__name__)

Muxer = Callable[[bytes, Sequence[bytes]], bytes]
"""(init, media of all segments in order) -> a progressive MP4."""


Still = Literal["thumbnail", "spritesheet", "last_frame"]
STILL_TYPES: dict[Still, str] = {"thumbnail": "image/webp", "spritesheet": "image/jpeg", "last_frame": "image/png"}
"""Pictures of a video, and their media types."""


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


class Engine(Protocol):
    """What makes videos."""

    def submit(self, request: VideoRequest) -> AsyncGenerator[Event, None]:
        """Events of one request, ending with Completed or Failure; closing the generator cancels the request."""
        ...

    def is_ready(self) -> bool:
        """Whether requests would be served now."""
        ...

    def generated_fps(self, params: SamplingParams) -> float:
        """Frames per second at which a video with these parameters would be made alone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """A job has moved: `cursor` is the last step that was done, None before the first."""

    cursor: StepCursor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSegment:
    """A segment of a job, read from where it is kept."""

    index: int
    init: bytes
    media: bytes
    start_frame: int
    num_frames: int
    fps: float
    prompt_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """A job has ended; `error` is None when it completed."""

    error: HeliosError | None


JobEvent = JobProgress | JobSegment | JobEnded
"""What a watcher of a job sees: progress at most once per change that it had time for, every segment, one end."""


class GenerationTimeoutError(HeliosError):
    """The job waited or ran too long (HTTP 504)."""

    status, grpc_status, code, retryable = 504, "DEADLINE_EXCEEDED", "generation_timeout", False


class InternalError(HeliosError):
    """A defect on our side; the log has the cause (HTTP 500)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Part of a list of jobs in order of (created_at, id): at most `limit` behind the job `after`."""

    limit: int = 20
    after: str | None = None
    newest_first: bool = True
    states: frozenset[State] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where videos are kept and how many. A job beyond `max_kept` finished ones is forgotten, the oldest first."""

    data_dir: Path
    max_kept: int = 100
    max_active: int = 64

    def __post_init__(self) -> None:
        if self.max_kept < 1 or self.max_active < 1:
            raise ValueError(f"max_kept {self.max_kept} and max_active {self.max_active} must be at least 1")


class VideoService:
    """One object per process; every method runs on its event loop."""

    def __init__(
        self, *, engine: Engine, muxer: Muxer, stills: Stills, model: ModelInfo, config: ServiceConfig
    ) -> None:
        self.model = model
        self._engine = engine
        self._muxer = muxer
        self._stills = stills
        self._config = config
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._storing: set[str] = set()
        self._finished_ids: deque[str] = deque()
        self._videos_dir = config.data_dir / "videos"
        self._videos_dir.mkdir(parents=True, exist_ok=True)
        self._remove_segments()

    def is_ready(self) -> bool:
        """Whether a request would be served now."""
        return self._engine.is_ready()

    def create(self, parsed: ParsedRequest) -> Job:
        """Starts a job.

        Raises:
            CapacityError: `max_active` jobs are running or waiting.
        """
        if len(self._tasks) >= self._config.max_active:
            raise CapacityError(f"{len(self._tasks)} jobs are running or waiting, as many as this server takes")
        job = job_from(parsed, self.model)
        self._jobs[job.id] = job
        task = asyncio.create_task(self._run(job), name=job.id)
        self._tasks[job.id] = task
        task.add_done_callback(lambda done: self._end(job, done))
        return job

    async def wait(self, job: Job) -> StoredVideo:
        """The finished video of `job`; raises the job's error if it failed or was cancelled."""
        await job.finished.wait()
        return self._video_of(job)

    def get(self, video_id: str) -> Job:
        """Raises NotFoundError when there is no such job."""
        job = self._jobs.get(video_id)
        if job is None:
            raise NotFoundError(f"video {video_id[:64]}: not found", param="id")
        return job

    async def cancel(self, video_id: str) -> Job:
        """Ends a job; one that is finished, or only has its file to be written, completes unchanged."""
        job = self.get(video_id)
        task = self._tasks.get(video_id)
        if task is not None:
            if video_id not in self._storing:
                task.cancel()
            await job.finished.wait()
        return job

    def content(self, video_id: str) -> StoredVideo:
        """The finished video.

        Raises:
            NotFoundError: no such job.
            ConflictError: not finished, or failed.
        """
        job = self.get(video_id)
        if job.state in ("queued", "in_progress"):
            raise ConflictError(f"video {job.id}: {job.state}, {job.progress} % done; its content comes at the end")
        if job.error is not None:
            raise ConflictError(f"video {job.id}: {job.state}: {job.error.message}", code="video_failed")
        return self._video_of(job)

    async def still(self, video_id: str, variant: Still) -> tuple[bytes, str]:
        """A picture of a video, and its media type. The thumbnail is there with the first segment, the others at the
        end.

        Raises: NotFoundError, ConflictError as `content` does.
        """
        job = self.get(video_id)
        if variant != "thumbnail" or not job.segments:
            self.content(video_id)
        segments, a_second = list(job.segments), max(1, round(job.request.params.fps))

        def take() -> bytes:
            init, first, last = segments[0].init, segments[0].path, segments[-1].path
            if variant == "thumbnail":
                return self._stills.thumbnail(init, first.read_bytes())
            if variant == "last_frame":
                return self._stills.last_frame(init, last.read_bytes())
            return self._stills.spritesheet(init, [segment.path.read_bytes() for segment in segments], a_second)

        return await asyncio.to_thread(take), STILL_TYPES[variant]

    def list(self, page: Page) -> tuple[list[Job], bool]:
        """The jobs of a page, and whether more follow.

        Raises: NotFoundError for an unknown `after`.
        """
        jobs = sorted(self._jobs.values(), key=lambda job: (job.created_at, job.id), reverse=page.newest_first)
        if page.after is not None:
            jobs = jobs[jobs.index(self.get(page.after)) + 1 :]
        if page.states is not None:
            jobs = [job for job in jobs if job.state in page.states]
        return jobs[: page.limit], len(jobs) > page.limit

    async def delete(self, video_id: str) -> None:
        """Ends a job if it runs, and forgets it with its files.

        Raises: NotFoundError.
        """
        job = await self.cancel(video_id)
        if job.id in self._jobs:
            self._finished_ids.remove(job.id)
            self._forget(job.id)

    async def watch(self, job: Job, start: int = 0) -> AsyncGenerator[JobEvent, None]:
        """A job from segment `start` on, to its end; several may watch, and none of them holds the job up."""
        following, last_cursor, is_queued = start, None, False
        while True:
            if not is_queued and job.state == "queued":
                is_queued = True
                yield JobProgress(cursor=None)
            elif job.cursor is not None and job.cursor != last_cursor:
                last_cursor = job.cursor
                yield JobProgress(cursor=last_cursor)
            while following < len(job.segments):
                try:
                    segment = await asyncio.to_thread(_read_segment, job.request, job.segments[following])
                except FileNotFoundError:  # deleted, or forgotten, under the viewer's eyes
                    yield JobEnded(error=NotFoundError(f"video {job.id}: deleted", param="id"))
                    return
                yield segment
                following += 1
            if job.finished.is_set():
                if following >= len(job.segments):
                    yield JobEnded(error=None if job.error is None else copy.copy(job.error))
                    return
            elif following >= len(job.segments) and job.cursor == last_cursor:
                await job.wait_change()

    def generated_fps(self, params: SamplingParams) -> float:
        """Frames per second at which such a video would be made alone."""
        return self._engine.generated_fps(params)

    async def close(self) -> None:
        """Cancels what runs, waits for it, and removes the segments; finished videos stay."""
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._remove_segments()

    def _remove_segments(self) -> None:
        """Segments serve the viewers of jobs that this process knows."""
        for folder in self._videos_dir.glob("video_*/"):
            shutil.rmtree(folder, ignore_errors=True)

    def _video_of(self, job: Job) -> StoredVideo:
        if job.error is not None:
            raise copy.copy(job.error)
        assert job.video is not None
        return job.video

    async def _run(self, job: Job) -> None:
        """Follows the engine's events to the end; raises what ended the job early."""
        completed = False
        folder = self._videos_dir / job.id
        async with contextlib.aclosing(self._engine.submit(job.request)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    _note_step(job, event)
                elif isinstance(event, SegmentReady):
                    stored = await asyncio.to_thread(_store_segment, folder, event.segment)
                    _note_segment(job, stored)
                elif isinstance(event, Failure):
                    raise error_of(event)
                elif isinstance(event, Completed):
                    completed = True
        if not completed or not job.segments:
            raise GenerationError("the engine ended the request without a video")
        path = self._videos_dir / f"{job.id}.mp4"
        self._storing.add(job.id)
        job.video = await asyncio.to_thread(_store, path, self._muxer, job.segments)

    def _end(self, job: Job, task: asyncio.Task[None]) -> None:
        """Gives the job its final state, whatever ended its task, and forgets the oldest finished jobs."""
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            job.state, job.error = "cancelled", ConflictError(f"video {job.id}: cancelled", code="cancelled")
        elif error is None:
            job.state = "completed"
        elif isinstance(error, HeliosError):
            # A copy has no traceback, whose frames would keep the segments and the input pictures alive.
            job.state, job.error = "failed", copy.copy(error)
        else:
            logger.error("job %s failed", job.id, exc_info=error)
            job.state, job.error = "failed", InternalError("the video could not be made; the server's log says why")
        job.completed_at, job.total_ms = time.time(), job.elapsed_ms
        job.drop_media()
        self._storing.discard(job.id)
        del self._tasks[job.id]
        job.finished.set()
        job.changed()
        self._finished_ids.append(job.id)
        while len(self._finished_ids) > self._config.max_kept:
            self._forget(self._finished_ids.popleft())

    def _forget(self, video_id: str) -> None:
        job = self._jobs.pop(video_id)
        if job.video is not None:
            job.video.path.unlink(missing_ok=True)
        shutil.rmtree(self._videos_dir / video_id, ignore_errors=True)


def error_of(failure: Failure) -> HeliosError:
    """The error class of an engine's failure code; unknown codes are ours (HTTP 500)."""
    message, code = failure.message, failure.code
    if code in ("invalid_value", "media_invalid", "conflicting_parameters"):
        return InvalidRequestError(message, code=code)
    if code in ("capacity_exceeded", "draining", "no_worker", "storage_unavailable", "worker_lost"):
        return CapacityError(message, code=code)
    if code in ("queue_timeout", "generation_timeout"):
        return GenerationTimeoutError(message, code=code)
    if code == "cancelled":
        return ConflictError(message, code=code)
    return GenerationError(message, code=code)


def _note_step(job: Job, event: Progress) -> None:
    if job.state == "queued":
        job.state = "in_progress"
        job.queue_ms = max(0, job.elapsed_ms - round(event.device_ms))
    job.steps_done += 1
    job.device_ms += event.device_ms
    job.cursor = event.cursor
    job.changed()


def _note_segment(job: Job, segment: StoredSegment) -> None:
    job.segments.append(segment)
    job.chunks_done += 1
    if job.first_segment_ms is None:
        job.first_segment_ms = job.elapsed_ms
    job.changed()


def _store_segment(folder: Path, segment: Segment) -> StoredSegment:
    folder.mkdir(exist_ok=True)
    path = folder / f"{segment.chunk}.m4s"
    path.write_bytes(segment.media)
    return StoredSegment(
        path=path,
        init=segment.init,
        index=segment.chunk,
        start_frame=segment.start_frame,
        num_frames=segment.num_frames,
    )


def _read_segment(request: VideoRequest, stored: StoredSegment) -> JobSegment:
    return JobSegment(
        index=stored.index,
        init=stored.init,
        media=stored.path.read_bytes(),
        start_frame=stored.start_frame,
        num_frames=stored.num_frames,
        fps=request.params.fps,
        prompt_weight=request.prompt_weight(stored.index),
    )


def _store(path: Path, muxer: Muxer, segments: Sequence[StoredSegment]) -> StoredVideo:
    """Joins the segments and writes them in one rename, so that a reader never sees half a file."""
    data = muxer(segments[0].init, [segment.path.read_bytes() for segment in segments])
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)
    return StoredVideo(path=path, num_bytes=len(data), etag=f'"{hashlib.sha256(data).hexdigest()}"')
