"""What the executor answers, taken in: encodings, steps, chunks, segments, failures, and groups that come and go.

Knows what each answer means for the request that it is of; gives out no work, and reads no clock.
"""

from __future__ import annotations

from helios_serve.engine.group_watch import GroupWatch
from helios_serve.engine.poison import PoisonList
from helios_serve.engine.pool_jobs import decode_job, encoding_name, pixel_ratio
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.role_pool import RolePool
from helios_serve.engine.runs import Crew, Runs
from helios_serve.types import (
    Aborted,
    Beat,
    ChunkReady,
    ChunkRecord,
    Decoded,
    Encoded,
    ExecutorEvent,
    Failure,
    GroupLost,
    GroupUp,
    PackLimit,
    Parked,
    Prepared,
    Progress,
    Role,
    SegmentReady,
    StepDone,
    TaskDone,
    TaskFailed,
)


class Answers:
    """One for each engine.

    Args:
        poison: remembers requests that end their workers.
    """

    def __init__(self, crew: Crew, runs: Runs, watch: GroupWatch, poison: PoisonList) -> None:
        self._crew = crew
        self._runs = runs
        self._watch = watch
        self._poison = poison

    def take(self, event: ExecutorEvent, now: float) -> None:
        """Takes one answer in; nothing is given out."""
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
                self._crew.groups.aborted(event.task_id, now)
            case TaskFailed():
                self._on_failed(event, now)
            case GroupUp():
                self._on_up(event, now)
            case GroupLost():
                self._on_lost(event, now)
            case PackLimit():
                self._crew.groups.limited(event)

    def _on_encoded(self, event: Encoded, now: float) -> None:
        job = self._crew.encoders.finish(event.task_id)
        run = None if job is None or job.is_abandoned else self._runs.get(job.request_id)
        if run is None:
            self._crew.executor.drop([event.conditioning])
            return
        self._crew.recorder.phases(run, event.phases)
        for phase in event.phases:
            if phase.name == "text_encode":
                self._crew.model.observe_text(phase.seconds)
            else:
                self._crew.model.observe_media(phase.seconds)
        if job is None or job.name != encoding_name(run):  # a newer prompt is on its way
            self._crew.executor.drop([event.conditioning])
            return
        is_first = run.conditioning is None
        run.encoded(event.conditioning, event.generator_state)
        run.hold("prompt", False)
        if is_first and run.has_keeper:
            seconds = sum(phase.seconds for phase in event.phases)
            self._crew.publish(
                run.request_id,
                Prepared(
                    request_id=run.request_id,
                    conditioning=event.conditioning,
                    generator_state=event.generator_state,
                    seconds=seconds,
                ),
            )

    def _on_step(self, event: StepDone, now: float) -> None:
        shares = self._crew.groups.stepped(event, now)
        for share in shares:
            self._crew.recorder.step(share.cursor.stage, event.device_ms / 1000, len(shares))
            if not share.run.is_over:
                progress = Progress(request_id=share.run.request_id, cursor=share.cursor, device_ms=share.device_ms)
                self._crew.publish(share.run.request_id, progress)

    def _on_chunk(self, event: TaskDone, now: float) -> None:
        run = self._crew.groups.done(event.task_id, now)
        if run is None or run.is_over:
            self._crew.executor.drop([event.latents])
            return
        state, chunk = run.state, run.state.next_chunk - 1
        self._crew.recorder.phases(run, (event.phase,), chunk=chunk)
        if state.has_ended:
            self._runs.denoised(run)
        record = ChunkRecord(chunk=chunk, latents=event.latents, generator_state=event.generator_state)
        run.add(record)
        self._crew.executor.drop([*run.take_parked(), *run.take_replaced(), *run.spent_refs()])
        if run.has_keeper:
            ready = ChunkReady(
                request_id=run.request_id, record=record, attempt=run.num_dispatched, seconds=event.phase.seconds
            )
            self._crew.publish(run.request_id, ready)
        self._crew.vaes.add(decode_job(run, chunk, self._crew.model, self._crew.config))
        self._runs.hold(run, self._runs.vae_queue_is_long)
        self._runs.play(run, now)

    def _on_segment(self, event: Decoded, now: float) -> None:
        job = self._crew.vaes.finish(event.task_id)
        run = None if job is None or job.is_abandoned else self._runs.get(job.request_id)
        if run is None:
            return
        self._crew.recorder.phases(run, event.phases, chunk=event.segment.chunk)
        params = run.request.params
        self._crew.model.observe_decode(pixel_ratio(params), max(1e-6, sum(phase.seconds for phase in event.phases)))
        for segment in run.publishable(event.segment):
            stalled_before_s = run.state.stalled_s
            if run.state.live:
                run.state.published(segment.chunk, now)
            self._crew.recorder.published(run, segment, run.state.stalled_s - stalled_before_s, now)
            seconds = (_seconds_of(event, "decode"), _seconds_of(event, "mux"))
            self._crew.publish(run.request_id, SegmentReady(segment=segment, seconds=seconds))
        self._crew.executor.drop(run.spent_refs())
        is_long = self._runs.vae_queue_is_long
        for other in self._runs.unfinished:
            if other.state.is_held:
                self._runs.hold(other, is_long)
        self._runs.complete(run, now)

    def _on_parked(self, event: Parked, now: float) -> None:
        run = self._crew.groups.parked(event.task_id, now)
        if run is None or run.is_over:
            self._crew.executor.drop([event.state])
            return
        self._crew.executor.drop(run.take_parked())
        run.parked = event.state

    def _on_failed(self, event: TaskFailed, now: float) -> None:
        job = self._crew.encoders.finish(event.task_id)
        pool = self._crew.encoders
        if job is None:
            job, pool = self._crew.vaes.finish(event.task_id), self._crew.vaes
        if job is not None:
            run = self._runs.get(job.request_id)
            if job.is_abandoned or run is None:
                return
            job.attempt += 1
            job.is_suspect = True
            if event.fault == "request" or job.attempt >= self._crew.config.max_attempts:
                self._runs.fail(run, _failure(run, event), now)
            else:
                pool.add(job)
            return
        run = self._crew.groups.failed(event.task_id, now, is_callers_fault=event.fault == "request")
        if run is None or run.is_over:
            return
        self._crew.executor.drop(run.take_parked())
        self._crew.recorder.chunk_recomputed()
        if event.fault == "request" or run.state.attempt >= self._crew.config.max_attempts:
            self._runs.fail_after_decoding(run, _failure(run, event), now)
        for group, why in self._crew.groups.suspects():
            self._watch.condemn(group, why)

    def _on_up(self, event: GroupUp, now: float) -> None:
        self._watch.seen(event)
        if event.role == "dit":
            if not self._crew.groups.up(event):
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
            for run in self._crew.groups.lost(event, now):
                self._crew.executor.drop(run.take_parked())
                self._crew.recorder.chunk_recomputed()
                failure = self._loss_verdict(run, run.state.attempt, len(run.lost_alone), now)
                if failure is not None:
                    self._runs.fail_after_decoding(run, failure, now)
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
                self._runs.fail(owner, failure, now)

    def _loss_verdict(self, run: RequestRun, attempt: int, num_lost_alone: int, now: float) -> Failure | None:
        """How a request ends whose work a lost group was doing; None if the work is to be done again."""
        if num_lost_alone >= 2:
            self._poison.add(run.request, now)
            message = "this request ended two workers that ran nothing else; its content is refused for a while"
            return Failure(request_id=run.request_id, code="request_poisoned", message=message)
        if attempt >= self._crew.config.max_attempts:
            message = f"workers were lost in each of {attempt} attempts; try again later"
            return Failure(request_id=run.request_id, code="worker_lost", message=message)
        return None

    def _pool(self, role: Role) -> RolePool:
        return self._crew.encoders if role == "encoder" else self._crew.vaes


def _seconds_of(event: Decoded, name: str) -> float:
    return sum(phase.seconds for phase in event.phases if phase.name == name)


def _failure(run: RequestRun, event: TaskFailed) -> Failure:
    return Failure(request_id=run.request_id, code=event.code, message=event.message)
