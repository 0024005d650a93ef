"""A discrete-event world around the shipped scheduler: groups, VAE servers, an encoder and a virtual clock.

Knows how long things truly take and when they fail. Takes every decision from the policy it is given.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from helios_serve.engine.admission import AdmissionConfig, Applicant, Decision, Site, admit_live, admit_offline
from helios_serve.engine.fairness import AgeCredit, Tenants
from helios_serve.engine.request_state import Arrival, GroupState, RequestState
from helios_serve.engine.scheduler import Action, Park, SchedulerConfig, new_state, next_wake
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape, StepSample, StepShape
from helios_serve.types import PromptChange, SamplingParams, VideoRequest


class Policy(Protocol):
    """What `plan` is, and what the baselines are."""

    def __call__(
        self,
        now: float,
        jobs: Sequence[RequestState],
        groups: Sequence[GroupState],
        model: CostModel,
        cfg: SchedulerConfig,
        credit: AgeCredit,
        /,
    ) -> list[Action]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """How long a forward really takes: seconds of each stage alone, of which `shared_s` is paid once by a pack."""

    stage_s: tuple[float, ...]
    shared_s: float
    floor_s: float = 0.010

    def forward_s(self, steps: Sequence[StepShape]) -> float:
        alone = sum(self.stage_s[step.stage] for step in steps)
        return max(self.floor_s, alone - (len(steps) - 1) * self.shared_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One request of the workload."""

    at: float
    live: bool
    fps: float
    num_chunks: int
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """The machine, the truth and the settings of one run; times in seconds."""

    num_groups: int
    num_ranks: int
    truth: Truth
    prior: DevicePrior
    steps: tuple[int, ...] = (2, 2, 2)
    amplify: bool = True
    num_vaes: int = 2
    decode_s: float = 0.2
    encode_s: float = 0.05
    admission: AdmissionConfig | None = field(default_factory=AdmissionConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    run_s: float = 2400.0
    noise: float = 0.05
    slow_probability: float = 0.002
    mtbf_s: float | None = None
    detect_s: float = 2.0
    restart_s: float = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """What happened to one request."""

    incoming: Incoming
    decision: Decision
    job: RequestState | None = None
    started_at: float | None = None
    first_at: float | None = None
    finished_at: float | None = None
    num_published: int = 0
    decoded: set[int] = field(default_factory=set)

    def stall_share(self, end: float) -> float:
        """Stalled / (stalled + played) until `end`; 1 for a stream that never showed anything."""
        job = self.job
        if job is None or job.play0 is None:
            return 1.0
        position = job.play0 + job.stalled_s + self.num_published * job.period_s
        stalled = job.stalled_s + (max(0.0, end - position) if self.finished_at is None else 0.0)
        played = min(self.num_published * job.period_s, end - job.play0 - job.stalled_s)
        return stalled / (stalled + played) if stalled + played > 0 else 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class _Machine:
    """One group's true state."""

    members: list[RequestState] = field(default_factory=list)
    began_at: float | None = None
    dead: bool = False
    incarnation: int = 0
    steps_since_load: int = 0
    parking: set[str] = field(default_factory=set)
    busy_s: float = 0.0
    free_at: float = 0.0


class World:
    """Runs one workload under one policy; afterwards `records` and the counters tell what happened."""

    def __init__(self, cfg: WorldConfig, policy: Policy, workload: Sequence[Incoming], seed: int) -> None:
        self.cfg, self.policy = cfg, policy
        self.now = 0.0
        self.model = CostModel(ModelShape(), cfg.prior)
        self.tenants = Tenants()
        self.credit = AgeCredit()
        self.groups = [GroupState(group_id=f"g{i}", order=i, num_ranks=cfg.num_ranks) for i in range(cfg.num_groups)]
        self.machines = [_Machine() for _ in self.groups]
        self.jobs: list[RequestState] = []
        self.records: list[Record] = []
        self.chunk_ends: list[float] = []
        self.executed_tflop = 0.0
        self.num_plans = self.num_packed = self.num_parks = 0
        self.errors: list[float] = []
        """|predicted / true - 1| of the first forwards."""
        self._record_of: dict[str, Record] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._vae_queue: list[tuple[float, int, Record, int]] = []
        self._free_vaes = cfg.num_vaes
        self._encoder_free_at = 0.0
        self._wake_at = math.inf
        self._noise, self._faults = Random(seed + 5), Random(seed + 99)
        for incoming in workload:
            self._at(incoming.at, lambda incoming=incoming: self._arrive(incoming))  # type: ignore[misc]
        if cfg.mtbf_s is not None:
            for index in range(cfg.num_groups):
                self._schedule_failure(index, cfg.mtbf_s)

    def run(self) -> World:
        """Play all events up to the end of the run."""
        while self._events and self._events[0][0] <= self.cfg.run_s:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = self.cfg.run_s
        return self

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, event))

    def _arrive(self, incoming: Incoming) -> None:
        params = SamplingParams(
            width=640,
            height=384,
            num_frames=33 * incoming.num_chunks,
            fps=incoming.fps,
            seed=0,
            steps=self.cfg.steps,
            guidance_scale=1.0,
            amplify_first_chunk=self.cfg.amplify,
        )
        record = Record(incoming=incoming, decision=self._admit(incoming, params))
        self.records.append(record)
        if not record.decision.admitted:
            return
        request = VideoRequest(
            request_id=f"r{len(self.records)}",
            prompts=(PromptChange(chunk=0, prompt=""),),
            params=params,
            service_class="realtime" if incoming.live else "offline",
            tenant=incoming.tenant,
        )
        arrival = Arrival(seq=len(self.records), at=self.now, num_ranks=self.cfg.num_ranks)
        tenant = self.tenants.get(incoming.tenant)
        job = new_state(request, arrival, tenant, self.model, self.cfg.scheduler)
        if not job.live:
            self.tenants.enter(tenant)
        record.job = job
        self.jobs.append(job)
        self._record_of[job.request_id] = record
        self._encoder_free_at = max(self.now, self._encoder_free_at) + self.cfg.encode_s
        self._at(self._encoder_free_at, lambda: self._encoded(job))

    def _admit(self, incoming: Incoming, params: SamplingParams) -> Decision:
        if self.cfg.admission is None:
            return Decision(admitted=True)
        site = Site(jobs=self.jobs, groups=self.groups, num_vaes=self.cfg.num_vaes, tenants=self.tenants)
        applicant = Applicant(params=params, tenant=incoming.tenant, num_ranks=self.cfg.num_ranks)
        if incoming.live:
            return admit_live(self.now, applicant, site, self.model, self.cfg.admission)
        return admit_offline(applicant, site, self.model, self.cfg.admission)

    def _encoded(self, job: RequestState) -> None:
        job.is_ready = True
        self._plan()

    def _plan(self) -> None:
        self.num_plans += 1
        actions = self.policy(self.now, self.jobs, self.groups, self.model, self.cfg.scheduler, self.credit)
        for action in actions:
            if isinstance(action, Park):
                self.machines[int(action.group[1:])].parking.add(action.task.request_id)
                self.num_parks += 1
        for index, machine in enumerate(self.machines):
            if machine.began_at is None and self.groups[index].jobs:
                self._launch(index)
        wake = next_wake(self.now, self.jobs, self.cfg.scheduler)
        if wake is not None and (wake < self._wake_at or self._wake_at <= self.now):
            self._wake_at = wake
            self._at(wake, self._timer)

    def _timer(self) -> None:
        if self.now >= self._wake_at:
            self._wake_at = math.inf
        self._plan()

    def _launch(self, index: int) -> None:
        """Begin the next forward of a group."""
        group, machine = self.groups[index], self.machines[index]
        assert machine.began_at is None, "group double-booked"
        assert machine.free_at <= self.now, "group double-booked"
        machine.members = list(group.jobs)
        machine.began_at = self.now
        for job in machine.members:
            record = self._record_of[job.request_id]
            record.started_at = self.now if record.started_at is None else record.started_at
        group.forward_began(self.now, self.model)
        if machine.dead:
            return
        steps = tuple(job.step_shape for job in machine.members)
        true = self.cfg.truth.forward_s(steps)
        if len(self.errors) < 400:
            self.errors.append(abs(self.model.forward_s(group.num_ranks, steps) / true - 1))
        seconds = true * self._noise.lognormvariate(0.0, self.cfg.noise) if self.cfg.noise > 0 else true
        if self._noise.random() < self.cfg.slow_probability:
            seconds *= 3
        self.num_packed += len(steps) > 1
        incarnation = machine.incarnation
        self._at(self.now + seconds, lambda: self._boundary(index, incarnation, steps))

    def _boundary(self, index: int, incarnation: int, steps: tuple[StepShape, ...]) -> None:
        group, machine = self.groups[index], self.machines[index]
        if machine.incarnation != incarnation or machine.began_at is None:
            return
        seconds = self.now - machine.began_at
        machine.busy_s += seconds
        machine.free_at, machine.began_at = self.now, None
        self.model.observe(
            StepSample(
                num_ranks=group.num_ranks,
                steps=steps,
                seconds=seconds,
                steps_since_load=machine.steps_since_load,
            )
        )
        machine.steps_since_load += 1
        num_before = len(group.jobs)
        for job, step in zip(machine.members, steps, strict=True):
            self.executed_tflop += step.flops / 1e12
            if job.step_done():
                self._chunk_done(group, job)
            elif job.request_id in machine.parking:
                group.released(job)
                job.parked(self.now)
        machine.parking.clear()
        if len(group.jobs) < num_before:
            self._plan()
        elif group.jobs:
            self._launch(index)

    def _chunk_done(self, group: GroupState, job: RequestState) -> None:
        group.released(job)
        chunk, deadline = job.next_chunk, job.deadline if job.live else math.inf
        job.chunk_done(self.now, self.model)
        self.chunk_ends.append(self.now)
        if job.has_ended:
            self.jobs.remove(job)
            if not job.live:
                self.tenants.leave(job.tenant)
        self._num_events += 1
        heapq.heappush(self._vae_queue, (deadline, self._num_events, self._record_of[job.request_id], chunk))
        job.is_held = len(self._vae_queue) > 2 * self.cfg.num_vaes
        self._decode_next()

    def _decode_next(self) -> None:
        while self._free_vaes and self._vae_queue:
            _, _, record, chunk = heapq.heappop(self._vae_queue)
            self._free_vaes -= 1
            self._at(self.now + self.cfg.decode_s, lambda record=record, chunk=chunk: self._decoded(record, chunk))  # type: ignore[misc]
        self.model.vae_queue_s = self.cfg.decode_s * len(self._vae_queue) / self.cfg.num_vaes

    def _decoded(self, record: Record, chunk: int) -> None:
        self._free_vaes += 1
        self.model.observe_decode(1.0, self.cfg.decode_s)
        job = record.job
        assert job is not None
        assert chunk not in record.decoded, "chunk made twice"
        record.decoded.add(chunk)
        was_held, first = job.is_held, record.first_at is None
        job.is_held = False
        while record.num_published in record.decoded:
            job.published(record.num_published, self.now)
            record.num_published += 1
            record.first_at = self.now if record.first_at is None else record.first_at
        if record.num_published == record.incoming.num_chunks:
            record.finished_at = self.now
        self._decode_next()
        if was_held or (first and job.live):
            self._plan()

    def _schedule_failure(self, index: int, mtbf_s: float) -> None:
        self._at(self.now + self._faults.expovariate(1 / mtbf_s), lambda: self._fail(index))

    def _fail(self, index: int) -> None:
        machine = self.machines[index]
        machine.dead = True
        machine.incarnation += 1
        self._at(self.now + self.cfg.detect_s, lambda: self._detected(index))

    def _detected(self, index: int) -> None:
        machine = self.machines[index]
        self.groups[index].condemned(self.now)
        machine.began_at, machine.members = None, []
        machine.parking.clear()
        self._at(self.now + self.cfg.restart_s, lambda: self._restored(index))
        self._plan()

    def _restored(self, index: int) -> None:
        machine, group = self.machines[index], self.groups[index]
        machine.dead, machine.steps_since_load, machine.free_at = False, 0, self.now
        group.is_healthy = True
        assert self.cfg.mtbf_s is not None
        self._schedule_failure(index, self.cfg.mtbf_s)
        self._plan()
