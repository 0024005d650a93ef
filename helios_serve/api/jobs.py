"""The state of one job and its JSON forms. Knows no engine and no protocol; `service` is the only writer of a `Job`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from helios_serve.api import schemas
from helios_serve.api.convert import Limits, ParsedRequest
from helios_serve.api.sampling import ParameterWarning
from helios_serve.errors import HeliosError
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, StepCursor, VideoRequest

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVideo:
    """A finished MP4 on disk; `etag` is its quoted SHA-256."""

    path: Path
    num_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSegment:
    """The encoded frames of one chunk on disk; `init` is that of the whole video."""

    path: Path
    init: bytes
    index: int
    start_frame: int
    num_frames: int


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request on its way to a video. Mutable; its one owner is the service."""

    request: VideoRequest
    model: str
    warnings: tuple[ParameterWarning, ...]
    user: str | None
    metadata: Mapping[str, str] | None
    with_segments: bool
    """Whether its events carry the segments, or progress alone."""
    state: State = "queued"
    created_at: float = field(default_factory=time.time)
    """Unix seconds."""
    completed_at: float | None = None
    started_s: float = field(default_factory=time.monotonic)
    steps_done: int = 0
    chunks_done: int = 0
    device_ms: float = 0.0
    queue_ms: int | None = None
    first_segment_ms: int | None = None
    total_ms: int | None = None
    cursor: StepCursor | None = None
    """The last step that was done."""
    segments: list[StoredSegment] = field(default_factory=list)
    video: StoredVideo | None = None
    error: HeliosError | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def progress(self) -> int:
        """Percent of the steps that are done; 100 only when the video can be read."""
        if self.state == "completed":
            return 100
        return min(99, 100 * self.steps_done // self.request.params.total_steps)

    @property
    def elapsed_ms(self) -> int:
        return round(1000 * (time.monotonic() - self.started_s))

    @property
    def eta_s(self) -> float | None:
        """Seconds until the end at the pace so far; None before the first step and after the end."""
        if self.state != "in_progress" or self.progress == 0:
            return None
        return self.elapsed_ms / 1000 * (100 - self.progress) / self.progress

    def changed(self) -> None:
        """Wakes whoever watches the job."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self) -> None:
        await self._changed.wait()

    def drop_media(self) -> None:
        """Forgets the input pictures, which can be hundreds of megabytes."""
        self.request = replace(self.request, image=None, video=None)


def job_from(parsed: ParsedRequest, model: ModelInfo) -> Job:
    """A queued job."""
    return Job(
        request=parsed.request,
        model=model.name,
        warnings=parsed.warnings,
        user=parsed.user,
        metadata=parsed.metadata,
        with_segments=parsed.with_segments,
    )


def video_object(job: Job, base_url: str) -> schemas.Video:
    """The `Video` object; `base_url` ends without a slash."""
    public: Literal["queued", "in_progress", "completed", "failed"] = (
        "failed" if job.state == "cancelled" else job.state
    )
    return schemas.Video(
        id=job.id,
        object="video",
        model=job.model,
        status=public,
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None,
        prompt=job.request.prompts[0].prompt,
        size=_size(job),
        seconds=_seconds(job),
        error=None if job.error is None else error_detail(job.error),
        remixed_from_video_id=None,
        helios=schemas.VideoDetails(
            state=job.state,
            num_frames=job.request.params.num_output_frames,
            num_chunks=job.request.params.num_chunks,
            chunks_done=job.chunks_done,
            fps=_plain(job.request.params.fps),
            seed=job.request.params.seed,
            steps=list(job.request.params.steps),
            queue_position=None,
            eta_seconds=None if job.eta_s is None else round(job.eta_s, 3),
            urls=schemas.VideoUrls(
                content=content_url(job, base_url),
                stream=f"{base_url}/v1/videos/{job.id}/stream",
                events=f"{base_url}/v1/videos/{job.id}/events",
                hls=None,
            ),
            timing=_timing(job),
            usage=generation_usage(job),
            warnings=_warnings(job),
            user=job.user,
            metadata=None if job.metadata is None else dict(job.metadata),
            extended_from_video_id=None,
        ),
    )


def generation_object(job: Job, item: schemas.GenerationItem) -> schemas.Generation:
    """The answer to a synchronous call whose job is completed."""
    return schemas.Generation(
        id=job.id,
        object="video.generation",
        created=int(job.created_at),
        model=job.model,
        data=[item],
        size=_size(job),
        seconds=_seconds(job),
        output_format="mp4",
        usage=generation_usage(job),
        helios=schemas.GenerationDetails(
            seed=job.request.params.seed,
            fps=_plain(job.request.params.fps),
            steps=list(job.request.params.steps),
            warnings=_warnings(job),
            timing=_timing(job),
        ),
    )


def model_object(model: ModelInfo, created: int, limits: Limits) -> schemas.ModelItem:
    """What `model` can do; `created` in unix seconds."""
    return schemas.ModelItem(
        id=model.name,
        object="model",
        created=created,
        owned_by="helios",
        helios=schemas.ModelDetails(
            variant=model.variant,
            tasks=["t2v", "i2v", "v2v"],
            frames_per_chunk=FRAMES_PER_CHUNK,
            size_multiple=model.size_multiple,
            num_stages=model.num_stages,
            recommended_sizes=[f"{width}x{height}" for width, height in model.recommended_sizes],
            max_pixels=model.max_pixels,
            max_frames=limits.max_frames,
            default_fps=24,
            default_steps=list(model.default_steps),
            codecs=["h264", "vp9", "av1"],
            measured_fps=None,
        ),
    )


def error_detail(error: HeliosError) -> schemas.ErrorDetail:
    """The inner object of every error answer and of a failed job."""
    return schemas.ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)


def content_url(job: Job, base_url: str) -> str:
    """Where the finished video can be read."""
    return f"{base_url}/v1/videos/{job.id}/content"


def _size(job: Job) -> str:
    return f"{job.request.params.width}x{job.request.params.height}"


def _seconds(job: Job) -> str:
    """Playing time as a string, at most three decimals: 5.5, 1.375."""
    params = job.request.params
    return f"{params.num_output_frames / params.fps:.3f}".rstrip("0").rstrip(".")


def generation_usage(job: Job) -> schemas.Usage:
    """What a job has taken so far."""
    params = job.request.params
    return schemas.Usage(
        num_frames=params.num_output_frames,
        num_chunks=params.num_chunks,
        video_seconds=round(params.num_output_frames / params.fps, 3),
        gpu_seconds=round(job.device_ms / 1000, 3),
    )


def _timing(job: Job) -> schemas.Timing:
    return schemas.Timing(
        queue_ms=job.queue_ms,
        encode_ms=None,
        first_segment_ms=job.first_segment_ms,
        total_ms=job.total_ms,
    )


def _warnings(job: Job) -> list[schemas.WarningItem]:
    return [schemas.WarningItem(param=warning.param, message=warning.message) for warning in job.warnings]


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number
