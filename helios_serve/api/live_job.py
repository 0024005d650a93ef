"""What this process knows of a job that it runs, beyond the store: steps, times, who has to be woken. Mutable; its one
owner is the job's runner. Knows no engine and no store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helios_serve.api.job_spec import JobSpec
from helios_serve.api.jobs import JobPhase
from helios_serve.store.records import BlobRef, Lease
from helios_serve.types import PlayState, PromptChange, Restart, StepCursor, VideoRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedControl:
    """A session's new prompt or new history: the control that asked for it and the chunk that it begins with."""

    seq: int
    event_id: str
    change: PromptChange | Restart


@dataclass(slots=True, kw_only=True)
class JobStats:
    """Sums over a job's chunks, kept with each of them: milliseconds."""

    device_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    mux_ms: float = 0.0
    first_segment_ms: float | None = None
    generated_ms: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in self.__slots__}


def stats_of(row: Mapping[str, Any] | None) -> JobStats:
    """The sums that a chunk's row holds; zeros without one."""
    return JobStats() if row is None else JobStats(**row)


@dataclass(slots=True, kw_only=True, eq=False)
class LiveJob:
    """One job that this process runs."""

    lease: Lease
    spec: JobSpec
    asked: VideoRequest
    """As its row says, for those who look at the job: without pictures, and without what a session changed."""
    request: VideoRequest
    created_at: float
    seq: int
    """Counts the jobs of this process: the order of arrival."""
    stats: JobStats = field(default_factory=JobStats)
    has_started: bool = False
    is_waiting: bool = True
    """For its turn among the jobs of its tenant, before the engine is asked."""
    phase: JobPhase = "queued"
    first_chunk: int = 0
    steps_done: int = 0
    cursor: StepCursor | None = None
    num_published: int = 0
    init: tuple[bytes, BlobRef] | None = None
    """The init that the segments share, and where it is kept; None until there is a segment."""
    has_ended: bool = False
    allowed: int | None = None
    """Chunks that a session's viewer has given credit for; None before the first word of one."""
    play_state: PlayState = "running"
    applied: list[AppliedControl] = field(default_factory=list)
    started_mono_s: float | None = None
    is_watched: bool = False
    """Whether somebody follows it, or did."""
    _num_changes: int = 0
    _num_steps: int = 0
    """Steps and changes."""
    _until_change: set[asyncio.Future[None]] = field(default_factory=set)
    _until_step: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def total_steps(self) -> int:
        """Steps of this run, which may have begun at a later chunk."""
        return self.request.params.steps_from(self.first_chunk)

    def eta_s(self, now: float) -> float | None:
        """Seconds until the end at the pace so far; None before the first step and for sessions without an end."""
        if self.started_mono_s is None or self.steps_done == 0 or self.request.is_open_ended:
            return None
        left = max(0, self.total_steps - self.steps_done)
        return (now - self.started_mono_s) * left / self.steps_done

    def control_at(self, chunk: int) -> int:
        """The last control that is in force when `chunk` is made; 0 for none."""
        return max((control.seq for control in self.applied if control.change.chunk <= chunk), default=0)

    def changed(self) -> None:
        """Wakes whoever watches the job."""
        self._num_changes += 1
        _wake(self._until_change)
        self.stepped()

    def stepped(self) -> None:
        """Wakes those who follow its steps."""
        self._num_steps += 1
        _wake(self._until_step)

    def version(self, *, with_steps: bool = True) -> int:
        """What `next_change` asks for: taken before one looks, it misses none."""
        return self._num_steps if with_steps else self._num_changes

    async def next_change(self, version: int, *, with_steps: bool = True, limit_s: float | None = None) -> None:
        """Returns when there is another version, at once if there is one already, or after `limit_s`. A step makes one
        only `with_steps`."""
        if self.version(with_steps=with_steps) != version:
            return
        loop, waiting = asyncio.get_running_loop(), self._until_step if with_steps else self._until_change
        change: asyncio.Future[None] = loop.create_future()
        timer = None if limit_s is None else loop.call_later(limit_s, _settle, change)
        waiting.add(change)
        try:
            await change
        finally:
            waiting.discard(change)
            if timer is not None:
                timer.cancel()


def _wake(waiting: set[asyncio.Future[None]]) -> None:
    for change in waiting:
        _settle(change)


def _settle(change: asyncio.Future[None]) -> None:
    if not change.done():
        change.set_result(None)
