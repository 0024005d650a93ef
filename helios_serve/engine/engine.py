"""The engine: events in, plan, submit or signal, route. Knows requests, chunks and groups; sees references, never
tensors, and knows nothing of HTTP, stores, devices or clocks: the time is an argument of every call.

`async_engine` runs it on an event loop; the simulation of the tests under a virtual clock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from helios_serve.config import EngineConfig
from helios_serve.engine.admission import AdmissionConfig, Applicant, Decision, Site, admit_live, admit_offline
from helios_serve.engine.dit_groups import DitGroups
from helios_serve.engine.executor import Executor
from helios_serve.engine.fairness import Tenants
from helios_serve.engine.liveness import Liveness, LivenessConfig
from helios_serve.engine.poison import PoisonList
from helios_serve.engine.recorder import Recorder
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.request_state import Arrival
from helios_serve.engine.role_pool import PoolJob, RolePool
from helios_serve.engine.scheduler import new_state
from helios_serve.engine.step_cost import REFERENCE_PIXELS, CostModel
from helios_serve.errors import CapacityError, HeliosError, InvalidRequestError, QuotaError
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    Aborted,
    Beat,
    ChunkRecord,
    Completed,
    Decoded,
    DecodeTask,
    Encoded,
    EncodeTask,
    Event,
    ExecutorEvent,
    Failure,
    GroupLost,
    GroupUp,
    PackLimit,
    Parked,
    Progress,
    Role,
    SamplingParams,
    SegmentReady,
    StepDone,
    TaskDone,
    TaskFailed,
    VideoRequest,
)

logger = logging.getLogger(__name__)

MAX_UNDECODED_CHUNKS = 2
"""Chunks of one request that may wait for a VAE before its next chunk is held back."""


class Engine:
    """Serves requests through one executor. Not thread-safe: one loop owns it.

    Args:
        publish: takes the events of a request, the last one Completed or Failure.
    """

    def __init__(
        self,
        executor: Executor,
        model: CostModel,
        config: EngineConfig,
        publish: Callable[[str, Event], None],
        recorder: Recorder,
    ) -> None:
        self._executor = executor
        self._model = model
        self._config = config
        self._publish = publish
        self._recorder = recorder
        self._admission = AdmissionConfig(ttfc_target_s=config.ttfc_target_s, max_queue_wait_s=config.max_queue_wait_s)
        self._runs: dict[str, RequestRun] = {}
        self._unfinished: dict[str, RequestRun] = {}
        """Those with chunks still to be denoised, in order of arrival."""
        self._tenants = Tenants()
        self._groups = DitGroups(executor, model, config)
        self._encoders = RolePool(slots=1)
        self._vaes = RolePool(slots=config.slots_per_vae)
        self._condemned: set[str] = set()
        self._roles: dict[str, Role] = {}
        self._liveness = Liveness(LivenessConfig())
        self._poison = PoisonList(config.poison_s)
        self._num_accepted = 0
        self._is_draining = False

    @property
    def num_requests(self) -> int:
        return len(self._runs)

    def missing_roles(self) -> list[Role]:
        """Roles without a group that takes tasks."""
        members: dict[Role, int] = {
            "encoder": self._encoders.num_members,
            "dit": self._groups.num_healthy,
            "vae": self._vaes.num_members,
        }
        return [role for role, count in members.items() if count == 0]

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_drained(self) -> bool:
        """Whether nothing runs any more."""
        return self._groups.is_idle and self._vaes.is_idle and self._vaes.num_waiting == 0

    def generated_fps(self, params: SamplingParams) -> float:
        """Frames per second at which one group alone makes a video with these parameters, as far as is known now."""
        return FRAMES_PER_CHUNK / self._model.timing(params, 1, self._groups.num_ranks).occupied_s

    def submit(self, request: VideoRequest, now: float) -> None:
        """Accepts a request.

        Raises: CapacityError, QuotaError or InvalidRequestError when it is not admitted; GenerationError for content
        that ended its workers before.
        """
        self._poison.check(request, now)
        try:
            applicant = self._admit(request, now)
        except HeliosError as error:
            self._recorder.refused(error.code)
            raise
        self._num_accepted += 1
        arrival = Arrival(
            seq=self._num_accepted,
            at=now,
            num_ranks=applicant.num_ranks,
            is_interactive=request.is_interactive,
            is_strict=request.is_strict,
        )
        tenant = self._tenants.get(request.tenant)
        state = new_state(request, arrival, tenant, self._model, self._groups.scheduler_config)
        run = RequestRun(state=state, accepted_at=now)
        self._runs[request.request_id] = self._unfinished[request.request_id] = run
        if not state.live:
            self._tenants.enter(tenant)
        self._encoders.add(
            PoolJob(
                request_id=request.request_id,
                name="encode",
                deadline=state.deadline if state.live else math.inf,
                timeout_s=self._config.encode_timeout_s,
                expected_s=self._model.text_s() + (self._model.media_s() if applicant.has_media else 0.0),
                make_task=lambda task_id: EncodeTask(task_id=task_id, request=request),
            )
        )
        self.turn(now)

    def cancel(self, request_id: str, now: float) -> None:
        """Ends a request at the next step boundary; nothing more is published for it."""
        run = self._runs.get(request_id)
        if run is not None:
            self._recorder.finished(run, "abort", now)
            self._end(run)
            self.turn(now)

    def drain(self, now: float) -> None:
        """Takes nothing new in and starts no chunk; those that would take too long are stopped at a step boundary."""
        self._is_draining = True
        self._groups.abort_slower_than(self._config.drain_s)

    def fail_all(self, code: str, message: str, now: float) -> None:
        """Ends every request."""
        for run in list(self._runs.values()):
            self._fail(run, Failure(request_id=run.request_id, code=code, message=message), now)

    def handle(self, event: ExecutorEvent, now: float) -> None:
        """Takes one answer of the executor in; `turn` then gives out what has become possible."""
        match event:
            case Beat():
                self._liveness.beat(event.group, event.progress, bool(event.task_ids), now)
            case StepDone():
                self._on_step(event, now)
            case TaskDone():
                self._on_chunk(event, now)
            case Decoded():
                self._on_segment(event, now)
            case Encoded():
                self._on_encoded(event, now)
            case Parked():
                self._on_parked(event, now)
            case Aborted():
                self._groups.aborted(event.task_id, now)
            case TaskFailed():
                self._on_failed(event, now)
            case GroupUp():
                self._on_up(event, now)
            case GroupLost():
                self._on_lost(event, now)
            case PackLimit():
                self._groups.limited(event)

    def turn(self, now: float) -> None:
        """Gives out work: encodings, chunks as planned, decodings."""
        for group, job in self._encoders.assign(now):
            self._executor.submit(group, [job.make_task(job.task_id)])
        if not self._is_draining:
            self._groups.dispatch(list(self._unfinished.values()), now)
        for group, job in self._vaes.assign(now):
            self._executor.submit(group, [job.make_task(job.task_id)])
        self._model.vae_queue_s = self._vaes.waiting_s / max(1, self._vaes.num_members)

    def tick(self, now: float, interval_s: float) -> None:
        """Judges the groups; call it every `interval_s`."""
        verdicts = self._liveness.tick(now, interval_s, self._stuck_s)
        verdicts += self._groups.overdue(now) + self._encoders.overdue(now) + self._vaes.overdue(now)
        for group, why in dict(verdicts).items():
            self._condemn(group, why)
        for group, role in self._roles.items():
            self._recorder.progress_age(role, group, self._liveness.progress_age_s(group, now))
        self._record_queues()

    def next_wake(self, now: float) -> float | None:
        """When `turn` should be called though nothing happened."""
        if self._is_draining:
            return None
        return self._groups.next_wake(list(self._unfinished.values()), now)

    def _record_queues(self) -> None:
        num_running = sum(run.started_at is not None for run in self._runs.values())
        depths: dict[Role, int] = {
            "encoder": self._encoders.num_waiting,
            "dit": sum(run.state.waits_for_group for run in self._unfinished.values()),
            "vae": self._vaes.num_waiting,
        }
        self._recorder.queues(num_running=num_running, num_waiting=len(self._runs) - num_running, depths=depths)

    def _admit(self, request: VideoRequest, now: float) -> Applicant:
        missing = self.missing_roles()
        if self._is_draining:
            raise CapacityError("the server is shutting down; try again shortly", code="draining", retry_after_s=1.0)
        if missing:
            raise CapacityError(f"no worker for {', '.join(missing)} is up", code="no_worker", retry_after_s=5.0)
        if len(self._runs) >= self._config.max_requests:
            raise CapacityError(f"{len(self._runs)} requests are waiting or running; try again later")
        applicant = Applicant(
            params=request.params,
            tenant=request.tenant,
            num_ranks=self._groups.num_ranks,
            has_media=request.task != "t2v",
        )
        site = Site(
            jobs=[run.state for run in self._runs.values()],
            groups=self._groups.states,
            num_vaes=self._vaes.num_members,
            tenants=self._tenants,
        )
        if request.service_class == "realtime":
            decision = admit_live(now, applicant, site, self._model, self._admission)
        else:
            decision = admit_offline(applicant, site, self._model, self._admission)
        if not decision.admitted:
            raise _refusal(decision)
        return applicant

    def _on_encoded(self, event: Encoded, now: float) -> None:
        job = self._encoders.finish(event.task_id)
        run = None if job is None or job.is_abandoned else self._runs.get(job.request_id)
        if run is None:
            self._executor.drop([event.conditioning])
            return
        self._recorder.phases(event.phases)
        for phase in event.phases:
            if phase.name == "text_encode":
                self._model.observe_text(phase.seconds)
            else:
                self._model.observe_media(phase.seconds)
        run.encoded(event.conditioning, event.generator_state)

    def _on_step(self, event: StepDone, now: float) -> None:
        shares = self._groups.stepped(event, now)
        for share in shares:
            self._recorder.step(share.cursor.stage, event.device_ms / 1000, len(shares))
            if not share.run.is_over:
                progress = Progress(request_id=share.run.request_id, cursor=share.cursor, device_ms=share.device_ms)
                self._publish(share.run.request_id, progress)

    def _on_chunk(self, event: TaskDone, now: float) -> None:
        run = self._groups.done(event.task_id, now)
        if run is None or run.is_over:
            self._executor.drop([event.latents])
            return
        self._recorder.phases((event.phase,))
        state, chunk = run.state, run.state.next_chunk - 1
        if state.has_ended:
            del self._unfinished[run.request_id]
        run.add(ChunkRecord(chunk=chunk, latents=event.latents, generator_state=event.generator_state))
        self._executor.drop([*run.take_parked(), *run.spent_refs()])
        deadline = state.deadline - state.period_s if state.live else math.inf
        self._vaes.add(
            PoolJob(
                request_id=run.request_id,
                name=f"d{chunk}",
                deadline=deadline,
                timeout_s=self._config.decode_timeout_s,
                expected_s=self._model.decode_s(_pixel_ratio(run.request.params)),
                make_task=lambda task_id: DecodeTask(
                    task_id=task_id,
                    request_id=run.request_id,
                    chunk=chunk,
                    params=run.request.params,
                    latents=event.latents,
                    is_due=state.live,
                ),
            )
        )
        self._hold(run, self._vae_queue_is_long)

    @property
    def _vae_queue_is_long(self) -> bool:
        return self._vaes.num_waiting > 2 * self._vaes.num_members

    def _hold(self, run: RequestRun, is_long: bool) -> None:
        """Keeps a request from running ahead of the VAEs."""
        run.state.is_held = run.num_undecoded >= MAX_UNDECODED_CHUNKS or (is_long and run.num_undecoded > 0)

    def _on_segment(self, event: Decoded, now: float) -> None:
        job = self._vaes.finish(event.task_id)
        run = None if job is None or job.is_abandoned else self._runs.get(job.request_id)
        if run is None:
            return
        self._recorder.phases(event.phases)
        params = run.request.params
        self._model.observe_decode(_pixel_ratio(params), max(1e-6, sum(phase.seconds for phase in event.phases)))
        for segment in run.publishable(event.segment):
            stalled_before_s = run.state.stalled_s
            if run.state.live:
                run.state.published(segment.chunk, now)
            self._recorder.published(run, segment, run.state.stalled_s - stalled_before_s, now)
            self._publish(run.request_id, SegmentReady(segment=segment))
        self._executor.drop(run.spent_refs())
        is_long = self._vae_queue_is_long
        for other in self._unfinished.values():
            if other.state.is_held:
                self._hold(other, is_long)
        if run.num_published == params.num_chunks:
            self._recorder.finished(run, "stop", now)
            self._publish(run.request_id, Completed(request_id=run.request_id))
            self._end(run)
        elif run.failure is not None and run.num_undecoded == 0:
            self._fail(run, run.failure, now)

    def _on_parked(self, event: Parked, now: float) -> None:
        run = self._groups.parked(event.task_id, now)
        if run is None or run.is_over:
            self._executor.drop([event.state])
            return
        self._executor.drop(run.take_parked())
        run.parked = event.state

    def _on_failed(self, event: TaskFailed, now: float) -> None:
        job = self._encoders.finish(event.task_id)
        pool = self._encoders
        if job is None:
            job, pool = self._vaes.finish(event.task_id), self._vaes
        if job is not None:
            run = self._runs.get(job.request_id)
            if job.is_abandoned or run is None:
                return
            job.attempt += 1
            job.is_suspect = True
            if event.fault == "request" or job.attempt >= self._config.max_attempts:
                self._fail(run, _failure(run, event), now)
            else:
                pool.add(job)
            return
        run = self._groups.failed(event.task_id, now, is_callers_fault=event.fault == "request")
        if run is None or run.is_over:
            return
        self._executor.drop(run.take_parked())
        self._recorder.chunk_recomputed()
        if event.fault == "request" or run.state.attempt >= self._config.max_attempts:
            self._fail_after_decoding(run, _failure(run, event), now)
        for group, why in self._groups.suspects():
            self._condemn(group, why)

    def _on_up(self, event: GroupUp, now: float) -> None:
        self._roles[event.group] = event.role
        if event.role == "dit":
            if not self._groups.up(event):
                self._condemn(event.group, "its golden chunk differs from that of the other groups")
                return
        else:
            self._pool(event.role).up(event.group)
        self._liveness.up(event.group, now)
        self._recorder.up(event.role, event.group)

    def _on_lost(self, event: GroupLost, now: float) -> None:
        role = self._roles.get(event.group)
        if role is None:
            return
        logger.warning("group %s is lost: %s", event.group, event.why)
        self._condemned.discard(event.group)
        self._liveness.down(event.group)
        self._recorder.lost(role, event.group)
        if role == "dit":
            for run in self._groups.lost(event, now):
                self._executor.drop(run.take_parked())
                self._recorder.chunk_recomputed()
                failure = self._loss_verdict(run, run.state.attempt, len(run.lost_alone), now)
                if failure is not None:
                    self._fail_after_decoding(run, failure, now)
            return
        pool = self._pool(role)
        jobs = pool.lost(event.group)
        for job in jobs:
            job.attempt += 1
            job.is_suspect = True
            if len(jobs) == 1:
                job.lost_alone.add((event.group, event.incarnation))
            owner = self._runs.get(job.request_id)
            if owner is None:  # another of its jobs just ended it
                continue
            failure = self._loss_verdict(owner, job.attempt, len(job.lost_alone), now)
            if failure is None:
                pool.add(job)
            else:
                self._fail(owner, failure, now)

    def _loss_verdict(self, run: RequestRun, attempt: int, num_lost_alone: int, now: float) -> Failure | None:
        """How a request ends whose work a lost group was doing; None if the work is to be done again."""
        if num_lost_alone >= 2:
            self._poison.add(run.request, now)
            message = "this request ended two workers that ran nothing else; its content is refused for a while"
            return Failure(request_id=run.request_id, code="request_poisoned", message=message)
        if attempt >= self._config.max_attempts:
            message = f"workers were lost in each of {attempt} attempts; try again later"
            return Failure(request_id=run.request_id, code="worker_lost", message=message)
        return None

    def _pool(self, role: Role) -> RolePool:
        return self._encoders if role == "encoder" else self._vaes

    def _stuck_s(self, group: str) -> float:
        role = self._roles[group]
        if role == "dit":
            return self._groups.stuck_s(group)
        timeout = self._config.encode_timeout_s if role == "encoder" else self._config.decode_timeout_s
        return max(self._config.stuck_floor_s, timeout)

    def _condemn(self, group: str, why: str) -> None:
        if group in self._condemned:  # its loss is on its way; the next incarnation must not be meant
            return
        logger.error("group %s is condemned: %s", group, why)
        self._condemned.add(group)
        self._liveness.down(group)
        self._executor.condemn(group, why)

    def _fail_after_decoding(self, run: RequestRun, failure: Failure, now: float) -> None:
        """Ends a request that cannot go on once its finished chunks are delivered."""
        if run.num_undecoded == 0:
            self._fail(run, failure, now)
        else:
            run.failure = failure
            run.state.is_cancelled = True

    def _fail(self, run: RequestRun, failure: Failure, now: float) -> None:
        self._recorder.finished(run, "error", now)
        self._publish(run.request_id, failure)
        self._end(run)

    def _end(self, run: RequestRun) -> None:
        """Forgets a request; what still runs for it is told to stop, and its results will be dropped."""
        del self._runs[run.request_id]
        self._unfinished.pop(run.request_id, None)
        run.is_over = run.state.is_cancelled = True
        if not run.state.live:
            self._tenants.leave(run.state.tenant)
        self._groups.abort(run)
        self._encoders.abandon(run.request_id)
        self._vaes.abandon(run.request_id)
        self._executor.drop(run.all_refs())


def _refusal(decision: Decision) -> HeliosError:
    if decision.code == "rate_not_sustainable":
        return InvalidRequestError(decision.reason, param="fps", code=decision.code)
    kind = QuotaError if decision.code == "quota_exceeded" else CapacityError
    return kind(decision.reason, code=decision.code, retry_after_s=decision.retry_after_s)


def _failure(run: RequestRun, event: TaskFailed) -> Failure:
    return Failure(request_id=run.request_id, code=event.code, message=event.message)


def _pixel_ratio(params: SamplingParams) -> float:
    return params.width * params.height / REFERENCE_PIXELS
