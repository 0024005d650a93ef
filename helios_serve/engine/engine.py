"""The engine: events in, plan, submit or signal, route. Knows requests, chunks and groups; sees references, never
tensors, and knows nothing of HTTP, stores, devices or clocks: the time is an argument of every call.

`async_engine` runs it on an event loop; the simulation of the tests under a virtual clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from helios_serve.config import EngineConfig
from helios_serve.engine.admission import AdmissionConfig, Site, admit, start_in_s
from helios_serve.engine.dit_groups import DitGroups
from helios_serve.engine.executor import Executor
from helios_serve.engine.fairness import Tenants
from helios_serve.engine.group_watch import GroupWatch
from helios_serve.engine.poison import PoisonList
from helios_serve.engine.pool_jobs import decode_job, encode_job, encoding_name, pixel_ratio
from helios_serve.engine.recorder import Recorder
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.request_state import Arrival
from helios_serve.engine.role_pool import RolePool
from helios_serve.engine.scheduler import new_state
from helios_serve.engine.step_cost import CostModel
from helios_serve.errors import CapacityError, ConflictError, HeliosError
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    Aborted,
    Beat,
    ChunkReady,
    ChunkRecord,
    ChunkStarted,
    Completed,
    Decoded,
    Encoded,
    Event,
    ExecutorEvent,
    Failure,
    GroupLost,
    GroupUp,
    PackLimit,
    Parked,
    PlayChanged,
    Prepared,
    Progress,
    PromptChange,
    Restart,
    Resume,
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

MAX_UNCOMMITTED_CHUNKS = 4
"""Chunks of one request that its keeper may have in hand before its next chunk is held back."""


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
        self._watch = GroupWatch(executor, self._groups, config, recorder)
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
        """Whether nothing runs any more, and all that was made is kept."""
        is_kept = all(run.num_uncommitted == 0 for run in self._runs.values())
        return self._groups.is_idle and self._vaes.is_idle and self._vaes.num_waiting == 0 and is_kept

    def generated_fps(self, params: SamplingParams) -> float:
        """Frames per second at which one group alone makes a video with these parameters, as far as is known now."""
        return FRAMES_PER_CHUNK / self._model.timing(params, 1, self._groups.num_ranks).occupied_s

    def start_in_s(self, request: VideoRequest) -> float:
        """Seconds until a request would start if it were taken now, as far as is known now."""
        return start_in_s(request, self._site(), self._model)

    def check(self, request: VideoRequest, now: float) -> None:
        """Whether a request would be admitted now.

        Raises: CapacityError, QuotaError or InvalidRequestError when it would not; GenerationError for content that
        ended its workers before.
        """
        self._poison.check(request, now)
        try:
            self._admit(request, now)
        except HeliosError as error:
            self._recorder.refused(error.code)
            raise

    def submit(self, request: VideoRequest, now: float) -> None:
        """Accepts a request.

        Raises: as `check` does.
        """
        self.check(request, now)
        self.take(request, now)

    def take(
        self,
        request: VideoRequest,
        now: float,
        *,
        resume: Resume | None = None,
        has_keeper: bool = False,
        allowed: int | None = None,
    ) -> None:
        """Accepts a request that was admitted before.

        Args:
            resume: where it goes on that was begun before.
            has_keeper: `committed` will be told of every chunk that is kept; until then its latents stay readable.
            allowed: chunks that it may start before `allow` says more; None for all.

        Raises: CapacityError when the server is shutting down.
        """
        if self._is_draining:
            raise _draining()
        next_chunk = 0 if resume is None else resume.next_chunk
        self._num_accepted += 1
        arrival = Arrival(
            seq=self._num_accepted,
            at=now,
            num_ranks=self._groups.num_ranks,
            is_interactive=request.is_interactive,
            is_strict=request.is_strict,
        )
        tenant = self._tenants.get(request.tenant)
        state = new_state(request, arrival, tenant, self._model, self._groups.scheduler_config, next_chunk)
        run = RequestRun(state=state, accepted_at=now, has_keeper=has_keeper, allowed=allowed)
        self._runs[request.request_id] = run
        self._recorder.accepted(run)
        if not state.live:
            self._tenants.enter(tenant)
        if resume is not None:
            run.resume(resume)
            for chunk in resume.undecoded:
                self._vaes.add(decode_job(run, chunk, self._model, self._config))
        if not state.has_ended:
            self._unfinished[request.request_id] = run
            self._encoders.add(encode_job(run, self._model, self._config))
        self._play(run, now)
        self._complete(run, now)
        self.turn(now)

    def committed(self, request_id: str, chunk: int, now: float) -> None:
        """The keeper has the latents of `chunk` and all before it."""
        run = self._runs.get(request_id)
        if run is not None:
            run.num_committed = chunk + 1
            self._executor.drop(run.spent_refs())
            self._hold(run, self._vae_queue_is_long)
            self._complete(run, now)
            self.turn(now)

    def change_prompt(self, request_id: str, prompt: str, transition_chunks: int, now: float) -> int:
        """Switches a running request to another prompt; returns the chunk that begins to use it, which waits for the
        encoder.

        Raises: ConflictError when no chunk is left to be begun.
        """
        run = self._changeable(request_id)
        change = PromptChange(chunk=run.first_free_chunk, prompt=prompt, transition_chunks=transition_chunks)
        run.change_prompt(change)
        self._encode_again(run, now)
        return change.chunk

    def restart(self, request_id: str, seed: int, now: float) -> int:
        """Forgets the history of a running request; returns the chunk that begins anew.

        Raises: ConflictError when no chunk is left to be begun.
        """
        run = self._changeable(request_id)
        restart = Restart(chunk=run.first_free_chunk, seed=seed)
        run.restart(restart)
        self._encode_again(run, now)
        return restart.chunk

    def _changeable(self, request_id: str) -> RequestRun:
        run = self._runs.get(request_id)
        if run is None or (run.state.end_chunk is not None and run.first_free_chunk >= run.state.end_chunk):
            raise ConflictError(f"video {request_id}: its last chunk has begun; no later change can be seen")
        return run

    def _encode_again(self, run: RequestRun, now: float) -> None:
        """What changed reaches the DiT groups with a new conditioning, for which the next chunk waits."""
        run.hold("prompt", True)
        self._encoders.add(encode_job(run, self._model, self._config))
        self.turn(now)

    def allow(self, request_id: str, num_chunks: int, now: float) -> None:
        """Lets a request start its first `num_chunks` chunks: its viewer's credit."""
        run = self._runs.get(request_id)
        if run is not None:
            run.allowed = num_chunks
            self._play(run, now)
            self.turn(now)

    def pause(self, request_id: str, is_paused: bool, now: float) -> None:
        """Keeps a request from starting chunks, or lets it go on; the chunk in flight ends as usual."""
        run = self._runs.get(request_id)
        if run is not None:
            run.hold("pause", is_paused)
            self._play(run, now)
            self.turn(now)

    def release(self, request_id: str) -> None:
        """Gives away what was reserved for a realtime request that stands still."""
        run = self._runs.get(request_id)
        if run is not None:
            run.state.has_released = True

    def reserve(self, request_id: str, now: float) -> None:
        """Takes back what `release` gave away.

        Raises: as `check` does, when others have it.
        """
        run = self._runs.get(request_id)
        if run is not None and run.state.has_released:
            if run.state.live:
                self._admit(run.request, now)
            run.state.has_released = False

    def stop(self, request_id: str, now: float) -> int:
        """Ends a request after the chunk in flight; returns the number of chunks that it will have."""
        run = self._runs.get(request_id)
        if run is None:
            return 0
        state = run.state
        end = run.first_free_chunk if state.end_chunk is None else min(state.end_chunk, run.first_free_chunk)
        state.end_chunk = end
        if state.has_ended:
            self._unfinished.pop(request_id, None)
            self._encoders.abandon(request_id)
        else:
            run.hold("pause", False)
            run.allowed = None
            self._play(run, now)
        self._complete(run, now)
        self.turn(now)
        return end

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
                self._watch.beat(event, now)
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
            for run, num_sharing in self._groups.dispatch(list(self._unfinished.values()), now):
                if run.has_keeper:
                    name, chunk = run.request_id, run.state.next_chunk
                    self._publish(name, ChunkStarted(request_id=name, chunk=chunk, num_sharing=num_sharing))
        for group, job in self._vaes.assign(now):
            self._executor.submit(group, [job.make_task(job.task_id)])
        self._model.vae_queue_s = self._vaes.waiting_s / max(1, self._vaes.num_members)

    def tick(self, now: float, interval_s: float) -> None:
        """Judges the groups; call it every `interval_s`."""
        self._watch.tick(now, interval_s, self._encoders.overdue(now) + self._vaes.overdue(now))
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

    def _admit(self, request: VideoRequest, now: float) -> None:
        missing = self.missing_roles()
        if self._is_draining:
            raise _draining()
        if missing:
            raise CapacityError(f"no worker for {', '.join(missing)} is up", code="no_worker", retry_after_s=5.0)
        if len(self._runs) >= self._config.max_requests:
            raise CapacityError(f"{len(self._runs)} requests are waiting or running; try again later")
        admit(now, request, self._site(), self._model, self._admission)

    def _site(self) -> Site:
        return Site(
            jobs=[run.state for run in self._runs.values()],
            groups=self._groups.states,
            num_vaes=self._vaes.num_members,
            tenants=self._tenants,
        )

    def _on_encoded(self, event: Encoded, now: float) -> None:
        job = self._encoders.finish(event.task_id)
        run = None if job is None or job.is_abandoned else self._runs.get(job.request_id)
        if run is None:
            self._executor.drop([event.conditioning])
            return
        self._recorder.phases(run, event.phases)
        for phase in event.phases:
            if phase.name == "text_encode":
                self._model.observe_text(phase.seconds)
            else:
                self._model.observe_media(phase.seconds)
        if job is None or job.name != encoding_name(run):  # a newer prompt is on its way
            self._executor.drop([event.conditioning])
            return
        is_first = run.conditioning is None
        run.encoded(event.conditioning, event.generator_state)
        run.hold("prompt", False)
        if is_first and run.has_keeper:
            seconds = sum(phase.seconds for phase in event.phases)
            self._publish(
                run.request_id,
                Prepared(
                    request_id=run.request_id,
                    conditioning=event.conditioning,
                    generator_state=event.generator_state,
                    seconds=seconds,
                ),
            )

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
        state, chunk = run.state, run.state.next_chunk - 1
        self._recorder.phases(run, (event.phase,), chunk=chunk)
        if state.has_ended:
            self._unfinished.pop(run.request_id, None)
        record = ChunkRecord(chunk=chunk, latents=event.latents, generator_state=event.generator_state)
        run.add(record)
        self._executor.drop([*run.take_parked(), *run.take_replaced(), *run.spent_refs()])
        if run.has_keeper:
            ready = ChunkReady(
                request_id=run.request_id, record=record, attempt=run.num_dispatched, seconds=event.phase.seconds
            )
            self._publish(run.request_id, ready)
        self._vaes.add(decode_job(run, chunk, self._model, self._config))
        self._hold(run, self._vae_queue_is_long)
        self._play(run, now)

    @property
    def _vae_queue_is_long(self) -> bool:
        return self._vaes.num_waiting > 2 * self._vaes.num_members

    def _hold(self, run: RequestRun, is_long: bool) -> None:
        """Keeps a request from running ahead of the VAEs, and of its keeper."""
        run.hold("vae", run.num_undecoded >= MAX_UNDECODED_CHUNKS or (is_long and run.num_undecoded > 0))
        run.hold("store", run.num_uncommitted >= MAX_UNCOMMITTED_CHUNKS)

    def _play(self, run: RequestRun, now: float) -> None:
        """Keeps a session within its viewer's credit; while it is paused its deadlines move with the clock."""
        needs_credit = run.allowed is not None and run.state.next_chunk >= run.allowed
        run.hold("credit", needs_credit and not run.state.has_ended)
        before = run.play_state
        if run.is_held_by("pause"):
            run.play_state = "paused"
        else:
            run.play_state = "waiting_for_credit" if run.is_held_by("credit") else "running"
        if run.play_state == "paused":
            run.state.pause(now)
        else:  # who has not acknowledged yet still plays what it has
            run.state.resume(now)
        if run.play_state != before:
            self._publish(run.request_id, PlayChanged(request_id=run.request_id, state=run.play_state))

    def _complete(self, run: RequestRun, now: float) -> None:
        """Ends a request of which everything was delivered and kept."""
        if run.is_complete:
            self._recorder.finished(run, "stop", now)
            self._publish(run.request_id, Completed(request_id=run.request_id))
            self._end(run)
        elif run.failure is not None and run.num_undecoded == 0:
            self._fail(run, run.failure, now)

    def _on_segment(self, event: Decoded, now: float) -> None:
        job = self._vaes.finish(event.task_id)
        run = None if job is None or job.is_abandoned else self._runs.get(job.request_id)
        if run is None:
            return
        self._recorder.phases(run, event.phases, chunk=event.segment.chunk)
        params = run.request.params
        self._model.observe_decode(pixel_ratio(params), max(1e-6, sum(phase.seconds for phase in event.phases)))
        for segment in run.publishable(event.segment):
            stalled_before_s = run.state.stalled_s
            if run.state.live:
                run.state.published(segment.chunk, now)
            self._recorder.published(run, segment, run.state.stalled_s - stalled_before_s, now)
            seconds = (_seconds_of(event, "decode"), _seconds_of(event, "mux"))
            self._publish(run.request_id, SegmentReady(segment=segment, seconds=seconds))
        self._executor.drop(run.spent_refs())
        is_long = self._vae_queue_is_long
        for other in self._unfinished.values():
            if other.state.is_held:
                self._hold(other, is_long)
        self._complete(run, now)

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
            self._watch.condemn(group, why)

    def _on_up(self, event: GroupUp, now: float) -> None:
        self._watch.seen(event)
        if event.role == "dit":
            if not self._groups.up(event):
                self._watch.condemn(event.group, "its golden chunk differs from that of the other groups")
                return
        else:
            self._pool(event.role).up(event.group)
        self._watch.up(event, now)

    def _on_lost(self, event: GroupLost, now: float) -> None:
        role = self._watch.lost(event)
        if role is None:
            return
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
        self._executor.drop(list(run.all_refs()))


def _draining() -> CapacityError:
    return CapacityError("the server is shutting down; try again shortly", code="draining", retry_after_s=1.0)


def _seconds_of(event: Decoded, name: str) -> float:
    return sum(phase.seconds for phase in event.phases if phase.name == name)


def _failure(run: RequestRun, event: TaskFailed) -> Failure:
    return Failure(request_id=run.request_id, code=event.code, message=event.message)
