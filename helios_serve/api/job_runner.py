"""Runs the jobs of the store through the engine: claims them, resumes them where they stood, commits what they make.

Every chunk is durable before anybody is shown it. Knows leases, commits and the engine; knows no caller, no protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass

from helios_serve.api.engine_protocol import Engine
from helios_serve.api.job_keeping import FencedError, JobKeeper, Publish, patiently
from helios_serve.api.job_restoring import JobRestorer
from helios_serve.api.job_spec import read_spec
from helios_serve.api.live_job import LiveJob
from helios_serve.errors import CapacityError, GenerationError, HeliosError
from helios_serve.store.connect import Stores
from helios_serve.store.ending import JobError
from helios_serve.store.records import Job, Lease, State
from helios_serve.telemetry import JobState, Metrics
from helios_serve.types import (
    ChunkReady,
    ChunkStarted,
    Completed,
    Event,
    Failure,
    PlayChanged,
    Prepared,
    Progress,
    SegmentReady,
)

logger = logging.getLogger(__name__)

CLAIM_LIMIT = 64
POLL_S = 0.25
"""How often other replicas' doings are looked for."""
RETRY_S = 2.0
"""How soon a job that was given back, as the store did not answer, is run again."""
TIDY_S = 60.0
SWEEP_S = 600.0
COUNT_S = 5.0
_COUNTED: dict[JobState, tuple[State, ...]] = {
    "queued": ("queued",),
    "in_progress": ("running", "paused"),
    "completed": ("finished",),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
}
MAX_SOLO_CRASHES = 2
MAX_DISPATCHES = 10
"""Of one chunk without a commit, each of which ended with this process."""


class QueueTimeoutError(HeliosError):
    """The job waited longer than it was told to (HTTP 504)."""

    status, grpc_status, code, retryable = 504, "DEADLINE_EXCEEDED", "queue_timeout", False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """crashed: whether the last process of this data directory ended by a fault of its own, so that what it ran is
    suspect. notes_dispatch: whether a chunk can end this process. ends_sessions_s: how long a session without a
    connection may be resumed."""

    crashed: bool = False
    notes_dispatch: bool = True
    ends_sessions_s: float = 30.0


class JobRunner:
    """One object per process; everything runs on its event loop.

    Args:
        finish: called with a job's id and tenant when its last segment is durable.
        publish: called with each segment that is durable, and how its job stands then.
    """

    def __init__(
        self,
        stores: Stores,
        engine: Engine,
        finish: Callable[[str, str], Coroutine[None, None, None]],
        publish: Publish,
        config: RunnerConfig,
        metrics: Metrics,
    ) -> None:
        self._stores = stores
        self._engine = engine
        self._keeper = JobKeeper(stores, engine, publish, metrics)
        self._restorer = JobRestorer(stores, engine)
        self._finish = finish
        self._config = config
        self._metrics = metrics
        self._live: dict[str, LiveJob] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._num_claimed = 0
        self._turns = asyncio.Condition()
        self._is_closing = False
        self.store_problem: str | None = None
        """Why nothing can be kept at the moment."""

    @property
    def num_jobs(self) -> int:
        return len(self._live)

    @property
    def jobs(self) -> Iterable[LiveJob]:
        return self._live.values()

    def live(self, job_id: str) -> LiveJob | None:
        """The job, if this process runs it."""
        return self._live.get(job_id)

    async def start(self) -> None:
        """Takes over what an earlier process left, and keeps leases and files in order from then on."""
        while await self._claim_all():
            pass
        for work in (self._renew(), self._look(), self._tidy(), self._count()):
            self._chore(work)

    async def run(self, job_id: str) -> LiveJob | None:
        """Runs a job that was just created, or is to be resumed; None when it is not free."""
        for job in await self._stores.leases.claim(1, job_id=job_id):
            return self._begin(job)
        return self._live.get(job_id)

    async def ended(self, job_id: str) -> None:
        """The job's row has ended, or was paused: stops what runs for it, and wakes its watchers."""
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._stores.chunks.wake(job_id)

    async def close(self) -> None:
        """Gives all jobs back as they stand, for another process to go on with."""
        self._is_closing = True
        running = [*self._tasks.values(), *self._chores]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _chore(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    # Leases.

    async def _claim_all(self) -> bool:
        """Whether there may be more."""
        jobs = await self._stores.leases.claim(CLAIM_LIMIT, after_crash=self._config.crashed)
        for job in jobs:
            self._begin(job)
        return len(jobs) == CLAIM_LIMIT

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(3.0)
            with _logged("renewing leases"):
                try:
                    lost = await self._stores.leases.renew()
                except HeliosError as error:
                    self.store_problem = error.message
                    raise
                await self._probe()
                for lease in lost:
                    await self.ended(lease.job_id)

    async def _probe(self) -> None:
        """Whether files can be written; whether rows can is seen by the leases."""
        try:
            probe = await self._stores.blobs.put(f"probe of {time.time_ns()}".encode())
            await self._stores.blobs.discard(probe.key, 0.0)
        except HeliosError as error:
            self.store_problem = error.message
        else:
            self.store_problem = None

    async def _look(self) -> None:
        """Sees what other processes did, jobs that they ended, and claims what became free, here or there."""
        is_shared = self._stores.database.is_postgres
        while True:
            await asyncio.sleep(POLL_S if is_shared else RETRY_S)
            with _logged("looking for jobs"):
                if self._live and is_shared:
                    for notice in await self._stores.leases.notices():
                        await self.ended(notice.lease.job_id)
                        if notice.why == "pause":
                            await self._stores.leases.paused(notice.lease)
                if self._engine.is_ready():
                    await self._claim_all()

    async def _tidy(self) -> None:
        swept_at = time.monotonic()
        while True:
            await asyncio.sleep(TIDY_S)
            with _logged("tidying"):
                await self._stores.retention.tidy()
                if time.monotonic() - swept_at > SWEEP_S:
                    swept_at = time.monotonic()
                    await self._stores.retention.sweep()

    async def _count(self) -> None:
        """Tells the metrics what the store holds."""
        while True:
            with _logged("counting jobs"):
                by_state, num_bytes = await self._stores.jobs.totals()
                for state, names in _COUNTED.items():
                    self._metrics.jobs(state, sum(by_state.get(name, 0) for name in names))
                self._metrics.artifact_store(num_bytes)
            await asyncio.sleep(COUNT_S)

    # One job.

    def _begin(self, job: Job) -> LiveJob:
        self._num_claimed += 1
        spec = read_spec(job)
        asked = spec.request(job)
        live = LiveJob(
            lease=job.lease,
            spec=spec,
            asked=asked,
            request=asked,
            created_at=job.created_at,
            seq=self._num_claimed,
            has_started=job.started_at is not None,
        )
        self._live[job.id] = live
        self._tasks[job.id] = asyncio.create_task(self._run(job, live), name=job.id)
        return live

    async def _run(self, job: Job, live: LiveJob) -> None:
        """A job to its end, whatever that is; the row says which."""
        lease, leases = live.lease, self._stores.leases
        try:
            await self._serve(job, live)
        except FencedError:
            pass
        except asyncio.CancelledError:
            await asyncio.shield(leases.release([lease]))
        except CapacityError as error:  # the store or the engine is away: the job is run again
            logger.warning("job %s is given back: %s", job.id, error.message)
            with _logged("giving a job back"):
                await leases.release([lease])
        except HeliosError as error:
            await self._fail(lease, JobError(code=error.code, message=error.message))
        except Exception:
            logger.exception("job %s failed", job.id)
            message = "the video could not be made; the server's log says why"
            await self._fail(lease, JobError(code="internal_error", message=message))
        finally:
            del self._live[job.id], self._tasks[job.id]
            live.has_ended = True
            live.changed()
            self._stores.chunks.wake(job.id)
            if not self._is_closing:
                self._chore(self._next_turn())

    async def _fail(self, lease: Lease, error: JobError) -> None:
        with _logged(f"ending job {lease.job_id}"):
            await self._stores.leases.fail(lease, error)

    async def _next_turn(self) -> None:
        async with self._turns:
            self._turns.notify_all()

    async def _serve(self, job: Job, live: LiveJob) -> None:
        if job.solo_crashes >= MAX_SOLO_CRASHES:
            message = "this request ended two workers that ran nothing else"
            raise GenerationError(message, code="request_poisoned")
        if job.attempts >= MAX_DISPATCHES:
            message = f"the server ended {job.attempts} times while it made chunk {job.next_chunk}"
            raise GenerationError(message, code="worker_lost")
        deadline = _queue_deadline(job, live)
        try:
            async with asyncio.timeout_at(deadline):
                await self._wait_turn(live)
        except TimeoutError:
            raise _waited(live) from None
        request, resume = await self._restorer.restored(job, live)
        live.request, live.is_waiting, live.phase = request, False, "text_encode"
        live.changed()
        if resume.undecoded:  # segments come before any chunk starts
            await self._start(live)
        if request.is_interactive and live.allowed is None:  # nobody is connected
            live.allowed = live.num_published
        events = self._engine.run(request, resume=resume, has_keeper=True, allowed=live.allowed)
        try:
            async with aclosing(events), asyncio.timeout_at(deadline) as waiting:
                async for event in events:
                    if isinstance(event, ChunkStarted):
                        waiting.reschedule(None)
                    await self._on(event, live)
                    if isinstance(event, Completed):
                        return
        except TimeoutError:
            raise _waited(live) from None
        raise GenerationError(f"video {job.id}: the engine ended it without a result")

    async def _wait_turn(self, live: LiveJob) -> None:
        """Returns when fewer jobs of the tenant run than its key allows; in order of arrival."""
        limit = live.spec.max_running_jobs
        if limit is None:
            live.is_waiting = False
            return

        def is_next() -> bool:
            mine = [other for other in self._live.values() if other.tenant == live.tenant]
            ahead = [other for other in mine if other.is_waiting and other.seq < live.seq]
            return sum(not other.is_waiting for other in mine) + len(ahead) < limit

        async with self._turns:
            await self._turns.wait_for(is_next)
            live.is_waiting = False

    async def _on(self, event: Event, live: LiveJob) -> None:
        match event:
            case Progress():
                live.phase, live.cursor = "denoise", event.cursor
                live.steps_done += 1
                live.stats.device_ms += event.device_ms
                live.stepped()
            case ChunkStarted():
                await self._on_started(event, live)
            case Prepared():
                live.stats.encode_ms += 1000 * event.seconds
                if live.request.task != "t2v" and live.request.start is None:
                    await self._keeper.keep_start(event, live)
            case ChunkReady():
                await self._keeper.keep_latents(event, live)
            case SegmentReady():
                await self._keeper.keep_segment(event, live)
            case PlayChanged():
                live.play_state = event.state
                live.changed()
            case Completed():
                live.phase = "store"
                await self._finish(live.id, live.tenant)
            case Failure():
                raise error_of(event)

    async def _on_started(self, event: ChunkStarted, live: LiveJob) -> None:
        leases = self._stores.leases
        if live.started_mono_s is None:
            await self._start(live)
        if self._config.notes_dispatch and not await patiently(
            lambda: leases.dispatched([live.lease], event.num_sharing)
        ):
            raise FencedError

    async def _start(self, live: LiveJob) -> None:
        """The job runs now: it is in progress for everybody, and takes commits."""
        live.started_mono_s = time.monotonic()
        if not await patiently(lambda: self._stores.leases.start(live.lease)):
            raise FencedError
        live.has_started = True
        live.changed()


def error_of(failure: Failure) -> HeliosError:
    """The error of an engine's failure; a server that is closing is no failure of the job."""
    if failure.code == "draining":
        return CapacityError(failure.message, code=failure.code)
    return GenerationError(failure.message, code=failure.code)


def _waited(live: LiveJob) -> QueueTimeoutError:
    return QueueTimeoutError(f"video {live.id}: waited longer than its queue_timeout, {live.spec.queue_timeout_s} s")


def _queue_deadline(job: Job, live: LiveJob) -> float | None:
    """When, on the loop's clock, a job that has not begun gives up. The wall clock is asked only about jobs of an
    earlier process."""
    if live.spec.queue_timeout_s is None or live.has_started:
        return None
    waited_s = 0.0 if job.epoch == 1 else max(0.0, time.time() - live.created_at)
    return asyncio.get_running_loop().time() + live.spec.queue_timeout_s - waited_s


class _logged(suppress):  # noqa: N801  # reads as a statement
    """A background chore that fails is logged, and tried again at its next time."""

    def __init__(self, what: str) -> None:
        super().__init__(Exception)
        self._what = what

    def __exit__(self, *details: object) -> bool:
        error = details[1]
        if isinstance(error, Exception):
            logger.error("%s failed", self._what, exc_info=error)
            return True
        return False
