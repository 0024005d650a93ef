"""What a caller sees of a job, and its JSON forms. Snapshots only: they never change. Knows no engine, no store and no
protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from helios_serve.api import schemas
from helios_serve.api.convert import Limits
from helios_serve.api.limits import FrameBudget
from helios_serve.api.sampling import ParameterWarning
from helios_serve.errors import HeliosError
from helios_serve.types import FRAMES_PER_CHUNK, ModelInfo, StepCursor, VideoRequest

State = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
JobPhase = Literal["queued", "text_encode", "denoise", "store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds; None where the job has not come to yet. device_ms: time of the DiT devices so far."""

    queue_ms: int | None = None
    encode_ms: int | None = None
    first_segment_ms: int | None = None
    denoise_ms: int | None = None
    decode_ms: int | None = None
    mux_ms: int | None = None
    total_ms: int | None = None
    device_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as its owner sees it at one moment.

    request: without pictures. with_segments: its events carry the segments, not progress alone. chunks_done: segments 0
    to `chunks_done` - 1 can be read. num_chunks, num_frames: of the result; of an open-ended session that still runs,
    bounds. continued_frames: of its caller's own video, those that begin this one. Times in seconds of the Unix epoch.
    """

    id: str
    model: str
    state: State
    request: VideoRequest
    warnings: tuple[ParameterWarning, ...]
    user: str | None
    metadata: Mapping[str, str] | None
    with_segments: bool
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    chunks_done: int
    progress: int
    queue_position: int | None
    eta_s: float | None
    timing: Timing
    error: HeliosError | None
    is_open_ended: bool
    num_chunks: int
    num_frames: int
    remixed_from: str | None
    extended_from: str | None
    mime_type: str | None
    continued_frames: range | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("queued", "in_progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVideo:
    """A finished MP4, by the hash of its content."""

    key: str
    num_bytes: int

    @property
    def etag(self) -> str:
        return f'"{self.key.replace("/", "")}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """A job has moved: `cursor` is the last step that was done, None before the first."""

    job: Job
    cursor: StepCursor | None
    phase: JobPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSegment:
    """A segment of a job. generated_ms: from the job's creation until it was there."""

    index: int
    init: bytes
    media: bytes
    start_frame: int
    num_frames: int
    fps: float
    prompt: str
    prompt_weight: float
    is_last: bool
    generated_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """A job has ended; `job.error` says how, None when it completed."""

    job: Job


JobEvent = JobProgress | JobSegment | JobEnded
"""What a watcher of a job sees: progress at most once per change that it had time for, every segment, one end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a call that creates a job came in. route: its verb, for idempotency. is_retry: the client says that it sends
    the call again, without a key."""

    route: str
    idempotency_key: str | None = None
    is_retry: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """is_replayed: the job existed, by its idempotency key or as the same call's earlier try. budget: the caller's
    frames after it, where they are counted."""

    job: Job
    is_replayed: bool
    budget: FrameBudget | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Part of a list of jobs in order of (created_at, id): at most `limit` behind the job `after`."""

    limit: int = 20
    after: str | None = None
    newest_first: bool = True
    states: frozenset[State] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Where a job's bytes can be read, signed where keys are in use."""

    content: str
    stream: str
    events: str
    hls: str


def video_object(job: Job, links: Links) -> schemas.Video:
    """The `Video` object of the API."""
    public: dict[State, Literal["queued", "in_progress", "completed", "failed"]] = {
        "queued": "queued",
        "in_progress": "in_progress",
        "completed": "completed",
        "expired": "completed",
        "failed": "failed",
        "cancelled": "failed",
    }
    return schemas.Video(
        id=job.id,
        object="video",
        model=job.model,
        status=public[job.state],
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        prompt=job.request.prompts[0].prompt,
        size=_size(job),
        seconds=_seconds(job),
        error=None if job.error is None else error_detail(job.error),
        remixed_from_video_id=job.remixed_from,
        helios=schemas.VideoDetails(
            state=job.state,
            num_frames=job.num_frames,
            num_chunks=job.num_chunks,
            chunks_done=job.chunks_done,
            fps=_plain(job.request.params.fps),
            seed=job.request.params.seed,
            steps=list(job.request.params.steps),
            approximations=list(job.request.params.approximations),
            queue_position=job.queue_position,
            eta_seconds=None if job.eta_s is None else round(job.eta_s, 3),
            urls=schemas.VideoUrls(content=links.content, stream=links.stream, events=links.events, hls=links.hls),
            timing=_timing(job),
            usage=generation_usage(job),
            warnings=_warnings(job),
            user=job.user,
            metadata=None if job.metadata is None else dict(job.metadata),
            extended_from_video_id=job.extended_from,
            continued_frames=_continued(job),
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
            approximations=list(job.request.params.approximations),
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
            example_prompt=model.example_prompt,
            codecs=["h264", "vp9", "av1"],
            approximations=list(model.approximations),
            measured_fps=None,
        ),
    )


def error_detail(error: HeliosError) -> schemas.ErrorDetail:
    """The inner object of every error answer and of a failed job."""
    return schemas.ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)


def _size(job: Job) -> str:
    return f"{job.request.params.width}x{job.request.params.height}"


def _seconds(job: Job) -> str:
    """Playing time as a string, at most three decimals: 5.5, 1.375."""
    return f"{job.num_frames / job.request.params.fps:.3f}".rstrip("0").rstrip(".")


def generation_usage(job: Job) -> schemas.Usage:
    """What a job has taken so far."""
    return schemas.Usage(
        num_frames=job.num_frames,
        num_chunks=job.num_chunks,
        video_seconds=round(job.num_frames / job.request.params.fps, 3),
        gpu_seconds=round(job.timing.device_ms / 1000, 3),
    )


def _continued(job: Job) -> schemas.ContinuedFrames | None:
    frames = job.continued_frames
    return None if frames is None else schemas.ContinuedFrames(first=frames[0], last=frames[-1])


def _timing(job: Job) -> schemas.Timing:
    timing = job.timing
    return schemas.Timing(
        queue_ms=timing.queue_ms,
        encode_ms=timing.encode_ms,
        first_segment_ms=timing.first_segment_ms,
        total_ms=timing.total_ms,
    )


def _warnings(job: Job) -> list[schemas.WarningItem]:
    return [schemas.WarningItem(param=warning.param, message=warning.message) for warning in job.warnings]


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number
