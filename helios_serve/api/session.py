"""One connection to an interactive job: prompt changes, credit, pause and stop, each durable before it is confirmed.

Knows the job's controls and the engine's side of them; knows no protocol. Several connections may follow each other, as
a job outlives them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from typing import Literal

from helios_serve.api.auth import Caller
from helios_serve.api.engine_protocol import Engine
from helios_serve.api.job_runner import JobRunner
from helios_serve.api.job_spec import changed
from helios_serve.api.jobs import Job, JobEnded, JobEvent, JobProgress, JobSegment
from helios_serve.api.live_job import AppliedControl, LiveJob
from helios_serve.errors import ConflictError, HeliosError, InvalidRequestError
from helios_serve.store.connect import Stores
from helios_serve.store.records import Control
from helios_serve.telemetry import Metrics
from helios_serve.types import FRAMES_PER_CHUNK, PlayState, PromptChange, Restart

Action = Literal["pause", "resume", "reset", "stop"]
DEFAULT_TRANSITION_CHUNKS = 2
MAX_PROMPT_CHARS = 32_000
AUTO_AHEAD = 8
"""Segments ahead of a reader that gives no credit: what it takes is its credit."""
CHECK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """resume_s: how long a session without a connection can be gone on with. reserved_s: for how much of that time its
    capacity is kept. idle_s: how long a session may stand still."""

    resume_s: float = 30.0
    reserved_s: float = 10.0
    idle_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptQueued:
    """A new prompt is accepted and durable; `earliest_chunk` will begin to use it."""

    event_id: str
    earliest_chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptApplied:
    """The segment that follows, `chunk`, is the first with a new prompt; `completed_chunk` the first with nothing of
    the old one."""

    event_id: str
    chunk: int
    completed_chunk: int
    start_frame: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """Generation stands still or goes on; `event_id` of the message that asked for it."""

    state: PlayState
    event_id: str | None


SessionEvent = JobProgress | JobSegment | PromptApplied | SessionState | JobEnded


@dataclass(slots=True, kw_only=True, eq=False)
class SessionDesk:
    """What all sessions of a server share. num_connections: by job, of those that are open."""

    stores: Stores
    engine: Engine
    runner: JobRunner
    watch: Callable[[Caller, str, int], AsyncGenerator[JobEvent, None]]
    metrics: Metrics
    config: SessionConfig
    num_connections: dict[str, int] = field(default_factory=dict)
    _ending: set[asyncio.Task[None]] = field(default_factory=set)

    def opened(self, job_id: str) -> None:
        self.num_connections[job_id] = self.num_connections.get(job_id, 0) + 1
        self.metrics.sessions(len(self.num_connections))

    def left(self, tenant: str, job_id: str) -> None:
        """A connection is gone; without another one within `resume_s` the session ends with what it has."""
        self.num_connections[job_id] -= 1
        if self.num_connections[job_id] == 0:
            del self.num_connections[job_id]
            self.metrics.sessions(len(self.num_connections))
            self.engine.pause(job_id, True)
            self.abandoned(tenant, job_id)

    def abandoned(self, tenant: str, job_id: str) -> None:
        """Nobody is connected to a session: it ends unless somebody comes."""
        task = asyncio.create_task(self._end_later(tenant, job_id))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def allow(self, job_id: str, num_chunks: int) -> None:
        """Lets a session make its first `num_chunks` chunks."""
        live = self.runner.live(job_id)
        if live is not None:
            live.allowed = num_chunks
            self.engine.allow(job_id, num_chunks)

    async def stop(self, tenant: str, job_id: str) -> None:
        """Ends a session after its chunk in flight."""
        if self.runner.live(job_id) is None:
            return
        num_chunks = self.engine.stop(job_id)
        await self.stores.jobs.stop(tenant, job_id, num_chunks=num_chunks)
        if num_chunks == 0:
            await self.runner.ended(job_id)

    def close(self) -> None:
        for task in self._ending:
            task.cancel()

    async def _end_later(self, tenant: str, job_id: str) -> None:
        reserved_s = min(self.config.reserved_s, self.config.resume_s)
        await asyncio.sleep(reserved_s)
        if job_id not in self.num_connections:
            self.engine.release(job_id)
        await asyncio.sleep(self.config.resume_s - reserved_s)
        if job_id not in self.num_connections:
            await self.stop(tenant, job_id)


class Session:
    """Made by `VideoService.open_session` and `resume_session`; the protocol calls `leave` when its connection is gone.

    Args:
        hold: counts as an open session of the caller until it is left.
        max_ahead: None gives credit as segments are taken from `events`.
    """

    def __init__(
        self, desk: SessionDesk, caller: Caller, job: Job, first_segment: int, max_ahead: int | None, hold: Hold
    ) -> None:
        self.job = job
        self.first_segment = first_segment
        self._desk = desk
        self._caller = caller
        self._max_ahead = max_ahead
        self._hold = hold
        self._lock = asyncio.Lock()
        self._asked_by: str | None = None
        self._is_open = True
        self._stood_since: float | None = None
        self._ends_at: float | None = None
        if caller.limits is not None:
            self._ends_at = time.monotonic() + caller.limits.max_session_seconds
        desk.opened(job.id)
        desk.engine.pause(job.id, False)
        self._allow(first_segment)
        self._watching = asyncio.create_task(self._watch_idle())

    @property
    def _live(self) -> LiveJob:
        """Raises ConflictError when the job has ended."""
        live = self._desk.runner.live(self.job.id)
        if live is None or live.has_ended:
            raise ConflictError(f"video {self.job.id}: the session has ended; it takes no more messages")
        return live

    async def events(self) -> AsyncGenerator[SessionEvent, None]:
        """Everything from `first_segment` on, to the end of the job."""
        state: PlayState = "running"
        async with aclosing(self._desk.watch(self._caller, self.job.id, self.first_segment)) as events:
            async for event in events:
                live = self._desk.runner.live(self.job.id)
                if live is not None and live.play_state != state:
                    state = live.play_state
                    yield SessionState(state=state, event_id=self._asked_by)
                    self._asked_by = None
                if isinstance(event, JobSegment):
                    for control in () if live is None else live.applied:
                        if control.change.chunk == event.index:
                            self._desk.metrics.interaction("applied")
                            yield _applied(control, state)
                    if self._max_ahead is None:
                        self._allow(event.index + 1)
                yield event

    async def change_prompt(self, prompt: str, transition_chunks: int | None, event_id: str | None) -> PromptQueued:
        """Switches to another prompt at the first chunk whose denoising has not begun. The same `event_id` and content
        again is the same message.

        Raises: InvalidRequestError; EventIdConflictError; ConflictError when no chunk is left; QuotaError with 64
        messages pending.
        """
        try:
            queued = await self._changed(prompt, transition_chunks, event_id)
        except HeliosError:
            self._desk.metrics.interaction("refused")
            raise
        self._desk.metrics.interaction("queued")
        return queued

    async def _changed(self, prompt: str, transition_chunks: int | None, event_id: str | None) -> PromptQueued:
        count = DEFAULT_TRANSITION_CHUNKS if transition_chunks is None else transition_chunks
        if not 1 <= len(prompt) <= MAX_PROMPT_CHARS:
            raise InvalidRequestError(f"prompt: must have 1 to {MAX_PROMPT_CHARS} characters", param="prompt")
        if not 0 <= count <= 1000:
            raise InvalidRequestError(f"transition_chunks {count}: must be 0 to 1000", param="transition_chunks")
        async with self._lock:
            live = self._live
            control = await self._desk.stores.jobs.add_control(
                self._caller.tenant,
                self.job.id,
                kind="prompt",
                payload={"prompt": prompt, "transition_chunks": count},
                event_id=event_id,
            )
            known = [earlier for earlier in live.applied if earlier.seq == control.seq]
            if known:
                return PromptQueued(event_id=known[0].event_id, earliest_chunk=known[0].change.chunk)
            chunk = self._desk.engine.change_prompt(self.job.id, prompt, count)
            change = PromptChange(chunk=chunk, prompt=prompt, transition_chunks=count)
            return PromptQueued(event_id=_take(live, control, change), earliest_chunk=chunk)

    async def _reset(self, event_id: str | None, seed: int | None) -> None:
        async with self._lock:
            live = self._live
            own = live.spec.params.seed if seed is None else seed
            control = await self._desk.stores.jobs.add_control(
                self._caller.tenant, self.job.id, kind="reset", payload={"seed": own}, event_id=event_id
            )
            if all(earlier.seq != control.seq for earlier in live.applied):
                chunk = self._desk.engine.restart(self.job.id, own)
                _take(live, control, Restart(chunk=chunk, seed=own))

    async def control(self, action: Action, event_id: str | None = None, seed: int | None = None) -> None:
        """Pauses after the chunk in flight, goes on, ends, or begins a new history at the first chunk whose denoising
        has not begun: with another seed, or again with the session's.

        Raises: ConflictError when the session has ended, or has no chunk left for a new history; InvalidRequestError;
        of a reset also EventIdConflictError and QuotaError, as `change_prompt`.
        """
        live = self._live
        if seed is not None and action != "reset":
            raise InvalidRequestError("seed: only with the action reset", param="seed")
        if action == "reset":
            await self._reset(event_id, seed)
            return
        self._asked_by = event_id
        if action == "stop":
            await self._desk.stop(self._caller.tenant, live.id)
        else:
            self._desk.engine.pause(live.id, action == "pause")

    def ack(self, segment: int) -> None:
        """All segments up to this one were consumed: generation may go on that much further."""
        self._allow(segment + 1)

    async def leave(self) -> None:
        """The connection is gone: generation pauses, and can be gone on with for a while."""
        if self._is_open:
            self._is_open = False
            self._watching.cancel()
            self._hold.__exit__(None, None, None)
            self._desk.left(self._caller.tenant, self.job.id)

    def _allow(self, num_consumed: int) -> None:
        ahead = AUTO_AHEAD if self._max_ahead is None else self._max_ahead
        self._desk.allow(self.job.id, num_consumed + ahead)

    async def _watch_idle(self) -> None:
        """Ends a session that stands still for too long, or has lasted as long as its key allows."""
        while True:
            await asyncio.sleep(CHECK_S)
            live, now = self._desk.runner.live(self.job.id), time.monotonic()
            if live is None or live.has_ended:
                return
            if live.play_state == "waiting_for_credit":
                self._desk.metrics.credit_wait(CHECK_S)
            if live.play_state == "running":
                self._stood_since = None
            elif self._stood_since is None:
                self._stood_since = now
            is_idle = self._stood_since is not None and now - self._stood_since > self._desk.config.idle_s
            if is_idle or (self._ends_at is not None and now > self._ends_at):
                await self._desk.stop(self._caller.tenant, live.id)
                return


Hold = AbstractContextManager[None]
"""What is given back when a session is left."""


def _take(live: LiveJob, control: Control, change: PromptChange | Restart) -> str:
    """Notes a change that the engine has taken; returns its event's id. One that it replaces is not told any more."""
    name = f"event_{control.seq}" if control.event_id is None else control.event_id
    kept = [
        earlier
        for earlier in live.applied
        if earlier.change.chunk < change.chunk or type(earlier.change) is not type(change)
    ]
    live.applied = [*kept, AppliedControl(seq=control.seq, event_id=name, change=change)]
    live.request = changed(live.request, change)
    return name


def _applied(control: AppliedControl, state: PlayState) -> PromptApplied | SessionState:
    """A new history is told as the state that goes on with it."""
    change = control.change
    if isinstance(change, Restart):
        return SessionState(state=state, event_id=control.event_id)
    return PromptApplied(
        event_id=control.event_id,
        chunk=change.chunk,
        completed_chunk=change.chunk + max(1, change.transition_chunks) - 1,
        start_frame=FRAMES_PER_CHUNK * change.chunk,
    )
