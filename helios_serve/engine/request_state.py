"""What the scheduler knows of each request and group, and how both change as work starts, parks, ends or is lost.

The only mutable nouns of the engine. Knows playback clocks and accounts; decides nothing and reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_serve.engine.fairness import TenantState
from helios_serve.engine.step_cost import ChunkTiming, CostModel, StepShape
from helios_serve.types import FRAMES_PER_CHUNK, StepCursor, VideoRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What admission fixed about a request: its number, time and pinned properties."""

    seq: int
    at: float
    num_ranks: int = 1
    is_interactive: bool = False
    is_strict: bool = False
    """`reproducible: strict`: never shares a forward with another request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTask:
    """One chunk of one request as the scheduler gives it out; `step` is the first step to run (parked chunks: > 0)."""

    request_id: str
    chunk: int
    attempt: int
    step: int
    predicted_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One unfinished request. The engine reports through the methods; `plan()` reads and dispatches."""

    request: VideoRequest
    arrival: Arrival
    tenant: TenantState
    live: bool
    timing: ChunkTiming
    steady: ChunkTiming
    """Predictions for the next chunk, and for any chunk but the first."""
    period_s: float
    due_ahead_s: float
    spare_ahead_s: float
    """A playing job is due when its deadline is at most this far; it may run ahead up to the second figure."""
    ttfc_target_s: float
    end_chunk: int | None
    """The number of chunks that it will have; None while it is open-ended."""

    next_chunk: int = 0
    first_chunk: int = 0
    """Where it went on that was begun before; its deadlines count from there."""
    step: int = 0
    attempt: int = 0
    is_ready: bool = False
    """The conditioning is there."""
    is_held: bool = False
    """Back-pressure, a disconnected client or an operator keep the request from starting chunks."""
    has_released: bool = False
    """Its viewer is gone: others may be given the capacity that was admitted for it."""
    is_cancelled: bool = False
    is_suspect: bool = False
    avoided_group: str | None = None
    """Where the chunk failed; it is tried again elsewhere."""

    group_id: str | None = None
    in_forward: bool = False
    """A forward with the next step is under way; False for a job that waits to join a pack."""
    task: PlannedTask | None = None
    tier: int = 0
    aged: bool = False
    demoted: bool = False
    last_service: float = 0.0

    play0: float | None = None
    stalled_s: float = 0.0
    paused_at: float | None = None
    deadline: float = 0.0
    executed_tflop: float = 0.0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def seq(self) -> int:
        return self.arrival.seq

    @property
    def cursor(self) -> StepCursor:
        """Where the next step stands."""
        params, step = self.request.params, self.step
        for stage, count in enumerate(params.steps_in(self.next_chunk)):
            if step < count:
                return StepCursor(chunk=self.next_chunk, stage=stage, step=step)
            step -= count
        return StepCursor(chunk=self.next_chunk + 1)

    @property
    def step_shape(self) -> StepShape:
        """The shape of the next step."""
        return self.timing.steps[self.step]

    @property
    def is_parked(self) -> bool:
        return self.step > 0 and self.group_id is None

    @property
    def waits_for_group(self) -> bool:
        """Whether the next chunk could start if a group had room."""
        return self.is_ready and self.group_id is None and not self.is_held and not self.is_cancelled

    @property
    def has_ended(self) -> bool:
        return self.end_chunk is not None and self.next_chunk >= self.end_chunk

    @property
    def chunks_left(self) -> int:
        """Chunks not done yet, the running one included; an open-ended job counts one."""
        return 1 if self.end_chunk is None else max(0, self.end_chunk - self.next_chunk)

    @property
    def chunk_left_s(self) -> float:
        """Predicted group-seconds of the next chunk, or of what is left of it."""
        return self.timing.remaining_s[self.step] if self.chunks_left else 0.0

    @property
    def work_left_s(self) -> float:
        """Predicted group-seconds of all chunks left."""
        return self.chunk_left_s + max(0, self.chunks_left - 1) * self.steady.remaining_s[0]

    @property
    def work_left_tflop(self) -> float:
        if not self.chunks_left:
            return 0.0
        return self.timing.tflop_left[self.step] + (self.chunks_left - 1) * self.steady.tflop_left[0]

    def is_due(self, now: float) -> bool:
        """Whether a live job's next chunk is within its run-ahead."""
        return self.play0 is None or self.deadline_at(now) - now <= self.due_ahead_s

    def deadline_at(self, now: float) -> float:
        """The next chunk's deadline; while the player stands still it moves with the clock."""
        return self.deadline if self.paused_at is None else self.deadline + now - self.paused_at

    def ends_at(self, now: float) -> float:
        """When a live job will have made its last chunk at the latest, if it keeps its deadlines; inf when open."""
        if self.end_chunk is None:
            return float("inf")
        return max(now, self.deadline + (self.chunks_left - 1) * self.period_s)

    @property
    def runs_alone(self) -> bool:
        return self.is_suspect or self.arrival.is_strict

    def dispatched(self, group_id: str, tier: int) -> PlannedTask:
        """The next chunk, or what is left of it, starts on a group; offline work is charged for it."""
        self.group_id, self.tier = group_id, tier
        if not self.live:
            self.tenant.charge(self.timing.tflop_left[self.step])
        self.task = PlannedTask(
            request_id=self.request_id,
            chunk=self.next_chunk,
            attempt=self.attempt,
            step=self.step,
            predicted_s=self.timing.remaining_s[self.step],
        )
        return self.task

    def step_done(self) -> bool:
        """One step of the running chunk is done; whether it was the last."""
        self.executed_tflop += self.timing.tflop_left[self.step] - self.timing.tflop_left[self.step + 1]
        self.step += 1
        self.in_forward = False
        return self.step == len(self.timing.steps)

    def chunk_done(self, now: float, model: CostModel) -> None:
        """The running chunk's latents exist."""
        self._leave_group(now)
        self.next_chunk += 1
        self.step, self.attempt, self.aged, self.avoided_group = 0, 0, False, None
        self.timing = self.steady = model.timing(self.request.params, self.next_chunk, self.arrival.num_ranks)
        self._set_deadline()

    def parked(self, now: float) -> None:
        """The running chunk left its group at a step boundary and keeps its progress."""
        self._refund()
        self._leave_group(now)

    def lost(self, now: float) -> None:
        """The running chunk's group is gone, or the chunk failed: it starts again from its first step."""
        self._refund()
        self._leave_group(now)
        self.step = 0
        self.attempt += 1

    def published(self, chunk: int, now: float) -> None:
        """Segment `chunk` became visible: starts the playback clock, or counts the time the player had to wait."""
        if self.play0 is None:
            self.play0 = now - chunk * self.period_s
        self.stalled_s += max(0.0, now - (self.play0 + self.stalled_s + chunk * self.period_s))
        self._set_deadline()

    def pause(self, now: float) -> None:
        """The player stands still: deadlines move with the clock."""
        if self.paused_at is None:
            self.paused_at = now

    def resume(self, now: float) -> None:
        """Playback goes on; the pause is not a stall."""
        if self.paused_at is None:
            return
        if self.play0 is not None:
            self.play0 += now - self.paused_at
        self.paused_at = None
        self._set_deadline()

    def _set_deadline(self) -> None:
        if self.play0 is None:
            first = self.arrival.at + self.ttfc_target_s
            self.deadline = first + (self.next_chunk - self.first_chunk) * self.period_s
        else:
            self.deadline = self.play0 + self.stalled_s + self.next_chunk * self.period_s

    def _refund(self) -> None:
        if not self.live:
            self.tenant.refund(self.timing.tflop_left[self.step])

    def _leave_group(self, now: float) -> None:
        self.group_id, self.task, self.in_forward = None, None, False
        self.last_service = now


@dataclass(slots=True, kw_only=True, eq=False)
class GroupState:
    """One DiT group as the scheduler sees it; `next_boundary` is when its running forward should end."""

    group_id: str
    order: int
    num_ranks: int = 1
    is_healthy: bool = True
    jobs: list[RequestState] = field(default_factory=list)
    park_pending: bool = False
    next_boundary: float = 0.0
    max_tokens: int | None = None
    """Tokens of one forward that are known to fit, once a pack ran out of memory."""

    @property
    def is_idle(self) -> bool:
        return self.is_healthy and not self.jobs

    @property
    def is_parkable(self) -> bool:
        """Whether the whole pack may make room: no due live job is in it, and no aged one, which runs as due."""
        if not self.is_healthy or self.park_pending or not self.jobs:
            return False
        return all(job.tier >= 1 for job in self.jobs)

    @property
    def is_open(self) -> bool:
        """Whether a running pack takes newcomers."""
        if not self.is_healthy or self.park_pending or not self.jobs:
            return False
        return not any(job.runs_alone or job.is_cancelled for job in self.jobs)

    def takes(self, job: RequestState) -> bool:
        """Whether the group may run this job's chunk at all."""
        return job.arrival.num_ranks == self.num_ranks and job.avoided_group != self.group_id

    @property
    def is_ending(self) -> bool:
        """Whether every chunk of the pack ends with the running forward."""
        return all(job.step + 1 >= len(job.timing.steps) for job in self.jobs)

    @property
    def stepping(self) -> list[RequestState]:
        """The jobs that the next forward advances: those that have made their last step only have to be handed over."""
        return [job for job in self.jobs if job.step < len(job.timing.steps)]

    def forward_began(self, now: float, model: CostModel) -> None:
        """The group's next forward holds a step of every job of the pack."""
        jobs = self.stepping
        shapes = tuple(job.step_shape for job in jobs)
        self.next_boundary = now + model.forward_s(self.num_ranks, shapes) if shapes else now
        for job in jobs:
            job.in_forward = True

    def released(self, job: RequestState) -> None:
        """A chunk left the pack: done, parked, aborted or failed."""
        self.jobs.remove(job)
        if not self.jobs:
            self.park_pending = False

    def condemned(self, now: float) -> list[RequestState]:
        """The group is gone; its chunks are lost and runnable again."""
        lost, self.jobs = self.jobs, []
        self.is_healthy, self.park_pending = False, False
        for job in lost:
            job.lost(now)
        return lost


def period_s(request: VideoRequest) -> float:
    """Seconds that one chunk plays."""
    return FRAMES_PER_CHUNK / request.params.fps
