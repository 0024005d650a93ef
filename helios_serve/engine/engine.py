"""The engine: events in, plan, submit or signal, route. Knows requests, chunks and groups; sees references, never
tensors, and knows nothing of HTTP, stores, devices or clocks: the time is an argument of every call. What it was asked
for is in `runs`, what the executor's answers mean in `answers`.

`async_engine` runs it on an event loop; the simulation of the tests under a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable

from helios_serve.config import EngineConfig
from helios_serve.engine.admission import AdmissionConfig, Site, admit, start_in_s
from helios_serve.engine.answers import Answers
from helios_serve.engine.dit_groups import DitGroups
from helios_serve.engine.executor import Executor
from helios_serve.engine.group_watch import GroupWatch
from helios_serve.engine.poison import PoisonList
from helios_serve.engine.pool_jobs import encode_job
from helios_serve.engine.recorder import Recorder
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.request_state import Arrival
from helios_serve.engine.role_pool import RolePool
from helios_serve.engine.runs import Crew, Runs
from helios_serve.engine.scheduler import new_state
from helios_serve.engine.step_cost import CostModel
from helios_serve.errors import CapacityError, ConflictError, HeliosError
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    ChunkStarted,
    Event,
    ExecutorEvent,
    Failure,
    PromptChange,
    Restart,
    Resume,
    Role,
    SamplingParams,
    VideoRequest,
)


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
        self._groups = DitGroups(executor, model, config)
        self._encoders = RolePool(slots=1)
        self._vaes = RolePool(slots=config.slots_per_vae)
        crew = Crew(
            executor=executor,
            model=model,
            config=config,
            publish=publish,
            recorder=recorder,
            groups=self._groups,
            encoders=self._encoders,
            vaes=self._vaes,
        )
        self._runs = Runs(crew)
        self._watch = GroupWatch(executor, self._groups, config, recorder)
        self._poison = PoisonList(config.poison_s)
        self._answers = Answers(crew, self._runs, self._watch, self._poison)
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
        is_kept = all(run.num_uncommitted == 0 for run in self._runs.all)
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
        tenant = self._runs.tenants.get(request.tenant)
        state = new_state(request, arrival, tenant, self._model, self._groups.scheduler_config, next_chunk)
        run = RequestRun(state=state, accepted_at=now, has_keeper=has_keeper, allowed=allowed)
        self._runs.add(run)
        if resume is not None:
            run.resume(resume)
        self._runs.begin(run, () if resume is None else resume.undecoded)
        self._runs.play(run, now)
        self._runs.complete(run, now)
        self.turn(now)

    def committed(self, request_id: str, chunk: int, now: float) -> bool:
        """The keeper has the latents of `chunk` and all before it. Whether that ended the request or lets it go on."""
        run = self._runs.get(request_id)
        if run is None:
            return False
        run.num_committed, was_held = chunk + 1, run.state.is_held
        self._executor.drop(run.spent_refs())
        self._runs.hold(run, self._runs.vae_queue_is_long)
        self._runs.complete(run, now)
        if run.is_over or run.state.is_held != was_held:
            self.turn(now)
            return True
        return False

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
            self._runs.play(run, now)
            self.turn(now)

    def pause(self, request_id: str, is_paused: bool, now: float) -> None:
        """Keeps a request from starting chunks, or lets it go on; the chunk in flight ends as usual."""
        run = self._runs.get(request_id)
        if run is not None:
            run.hold("pause", is_paused)
            self._runs.play(run, now)
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
            self._runs.denoised(run)
            self._encoders.abandon(request_id)
        else:
            run.hold("pause", False)
            run.allowed = None
            self._runs.play(run, now)
        self._runs.complete(run, now)
        self.turn(now)
        return end

    def cancel(self, request_id: str, now: float) -> None:
        """Ends a request at the next step boundary; nothing more is published for it."""
        run = self._runs.get(request_id)
        if run is not None:
            self._recorder.finished(run, "abort", now)
            self._runs.end(run)
            self.turn(now)

    def drain(self, now: float) -> None:
        """Takes nothing new in and starts no chunk; those that would take too long are stopped at a step boundary."""
        self._is_draining = True
        self._groups.abort_slower_than(self._config.drain_s)

    def fail_all(self, code: str, message: str, now: float) -> None:
        """Ends every request."""
        for run in self._runs.all:
            self._runs.fail(run, Failure(request_id=run.request_id, code=code, message=message), now)

    def handle(self, event: ExecutorEvent, now: float) -> None:
        """Takes one answer of the executor in; `turn` then gives out what has become possible."""
        self._answers.take(event, now)

    def turn(self, now: float) -> None:
        """Gives out work: encodings, chunks as planned, decodings."""
        for group, job in self._encoders.assign(now):
            self._executor.submit(group, [job.make_task(job.task_id)])
        if not self._is_draining:
            for run, num_sharing in self._groups.dispatch(self._runs.unfinished, now):
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
        return self._groups.next_wake(self._runs.unfinished, now)

    def _record_queues(self) -> None:
        num_running = sum(run.started_at is not None for run in self._runs.all)
        depths: dict[Role, int] = {
            "encoder": self._encoders.num_waiting,
            "dit": sum(run.state.waits_for_group for run in self._runs.unfinished),
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
            jobs=[run.state for run in self._runs.all],
            groups=self._groups.states,
            num_vaes=self._vaes.num_members,
            tenants=self._runs.tenants,
        )


def _draining() -> CapacityError:
    return CapacityError("the server is shutting down; try again shortly", code="draining", retry_after_s=1.0)
