"""The verbs of the API over one engine: create, wait, get, cancel, content. HTTP and gRPC translate to these.

Keeps jobs in memory and finished videos in a directory, both bounded. Knows no protocol, no model and no codec: the
engine makes segments and the muxer joins them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helios_serve.api.convert import ParsedRequest
from helios_serve.api.jobs import Job, StoredVideo, job_from
from helios_serve.errors import (
    CapacityError,
    ConflictError,
    GenerationError,
    HeliosError,
    InvalidRequestError,
    NotFoundError,
)
from helios_serve.types import Completed, Event, Failure, ModelInfo, Progress, SegmentReady, VideoRequest

logger = logging.getLogger(__name__)

Muxer = Callable[[bytes, Sequence[bytes]], bytes]
"""(init, media of all segments in order) -> a progressive MP4."""


class Engine(Protocol):
    """What makes videos."""

    def submit(self, request: VideoRequest) -> AsyncGenerator[Event, None]:
        """Events of one request, ending with Completed or Failure; closing the generator cancels the request."""
        ...

    def is_ready(self) -> bool:
        """Whether requests would be served now."""
        ...


class GenerationTimeoutError(HeliosError):
    """The job waited or ran too long (HTTP 504)."""

    status, grpc_status, code, retryable = 504, "DEADLINE_EXCEEDED", "generation_timeout", False


class InternalError(HeliosError):
    """A defect on our side; the log has the cause (HTTP 500)."""


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

    def __init__(self, *, engine: Engine, muxer: Muxer, model: ModelInfo, config: ServiceConfig) -> None:
        self.model = model
        self._engine = engine
        self._muxer = muxer
        self._config = config
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._storing: set[str] = set()
        self._finished_ids: deque[str] = deque()
        self._videos_dir = config.data_dir / "videos"
        self._videos_dir.mkdir(parents=True, exist_ok=True)

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

    async def close(self) -> None:
        """Cancels what runs and waits for it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _video_of(self, job: Job) -> StoredVideo:
        if job.error is not None:
            raise copy.copy(job.error)
        assert job.video is not None
        return job.video

    async def _run(self, job: Job) -> None:
        """Follows the engine's events to the end; raises what ended the job early."""
        init, media, completed = b"", list[bytes](), False
        async with contextlib.aclosing(self._engine.submit(job.request)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    _note_step(job, event)
                elif isinstance(event, SegmentReady):
                    _note_segment(job)
                    init = event.segment.init
                    media.append(event.segment.media)
                elif isinstance(event, Failure):
                    raise error_of(event)
                elif isinstance(event, Completed):
                    completed = True
        if not completed or not media:
            raise GenerationError("the engine ended the request without a video")
        path = self._videos_dir / f"{job.id}.mp4"
        self._storing.add(job.id)
        job.video = await asyncio.to_thread(_store, path, self._muxer, init, media)

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
        self._finished_ids.append(job.id)
        while len(self._finished_ids) > self._config.max_kept:
            self._forget(self._finished_ids.popleft())

    def _forget(self, video_id: str) -> None:
        job = self._jobs.pop(video_id)
        if job.video is not None:
            job.video.path.unlink(missing_ok=True)


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


def _note_segment(job: Job) -> None:
    job.chunks_done += 1
    if job.first_segment_ms is None:
        job.first_segment_ms = job.elapsed_ms


def _store(path: Path, muxer: Muxer, init: bytes, media: Sequence[bytes]) -> StoredVideo:
    """Joins the segments and writes them in one rename, so that a reader never sees half a file."""
    data = muxer(init, media)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)
    return StoredVideo(path=path, num_bytes=len(data), etag=f'"{hashlib.sha256(data).hexdigest()}"')
