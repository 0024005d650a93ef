"""What a client has seen of one request, and how it is written down while it happens.

Times are seconds of one monotonic clock; in an `Observed` they count from the start of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from helios_serve.bench.workload import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenSegment:
    """A segment whose last byte was there at `at_s`."""

    at_s: float
    num_frames: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One request from the moment it was due to its end."""

    planned: Planned
    due_s: float
    """When it should have been sent; every latency counts from here, so that a late client hides nothing."""
    sent_s: float
    ended_s: float
    segments: tuple[SeenSegment, ...] = ()
    num_frames: int | None = None
    """Counted in the bytes that came; None when they could not be read, or when none came."""
    num_bytes: int = 0
    num_chunks: int | None = None
    video_id: str | None = None
    preroll_s: float | None = None
    """How long a player waits after the first segment: what the server recommended, unless the run says otherwise."""
    server_timing_ms: Mapping[str, float] = field(default_factory=dict)
    """What the server says of itself."""
    made_as: str | None = None
    """Size, steps and rate that the server says it used."""
    warnings: tuple[str, ...] = ()
    error: str | None = None
    """The code of what went wrong, as in `targets.FailedError`."""
    status: int | None = None
    message: str | None = None

    @property
    def is_completed(self) -> bool:
        return self.error is None

    @property
    def playback_s(self) -> float | None:
        """How long the frames that came last at the target rate."""
        return None if not self.num_frames else self.num_frames / self.planned.kind.fps


@dataclass(slots=True, kw_only=True)
class Recording:
    """The notes of one request while it runs. `on_segment` is called with the frames of each segment."""

    planned: Planned
    origin: float
    """The run's start on the clock."""
    due_s: float
    preroll_s: float | None = None
    on_segment: Callable[[int], None] = lambda _: None
    segments: list[SeenSegment] = field(default_factory=list)
    num_frames: int | None = None
    num_bytes: int = 0
    num_chunks: int | None = None
    video_id: str | None = None
    server_timing_ms: dict[str, float] = field(default_factory=dict)
    made_as: str | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None
    status: int | None = None
    message: str | None = None
    sent_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.sent_s = self.now_s()

    def now_s(self) -> float:
        return time.perf_counter() - self.origin

    def add_segment(self, at_s: float, num_frames: int, num_bytes: int) -> None:
        self.segments.append(SeenSegment(at_s=at_s, num_frames=num_frames, num_bytes=num_bytes))
        self.num_frames = num_frames if self.num_frames is None else self.num_frames + num_frames
        self.num_chunks = len(self.segments)
        self.num_bytes += num_bytes
        self.on_segment(num_frames)

    def fail(self, code: str, message: str, status: int | None = None) -> None:
        self.error, self.message, self.status = code, message, status

    def finish(self, ended_s: float) -> Observed:
        return Observed(
            planned=self.planned,
            due_s=self.due_s,
            sent_s=self.sent_s,
            ended_s=ended_s,
            segments=tuple(self.segments),
            num_frames=self.num_frames,
            num_bytes=self.num_bytes,
            num_chunks=self.num_chunks,
            video_id=self.video_id,
            preroll_s=self.preroll_s,
            server_timing_ms=self.server_timing_ms,
            made_as=self.made_as,
            warnings=self.warnings,
            error=self.error,
            status=self.status,
            message=self.message,
        )
