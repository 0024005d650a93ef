"""The requests of an engine from acceptance to their end: what holds each of them back, and what is told of it.

Knows requests, what works for them and who is told; plans nothing, and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helios_serve.config import EngineConfig
from helios_serve.engine.dit_groups import DitGroups
from helios_serve.engine.executor import Executor
from helios_serve.engine.fairness import Tenants
from helios_serve.engine.pool_jobs import decode_job, encode_job
from helios_serve.engine.recorder import Recorder
from helios_serve.engine.request_run import RequestRun
from helios_serve.engine.role_pool import RolePool
from helios_serve.engine.step_cost import CostModel
from helios_serve.types import Completed, Event, Failure, PlayChanged

MAX_UNDECODED_CHUNKS = 2
"""Chunks of one request that may wait for a VAE before its next chunk is held back."""

MAX_UNCOMMITTED_CHUNKS = 4
"""Chunks of one request that its keeper may have in hand before its next chunk is held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What works for the requests of an engine, and what it is known to take. publish: takes the events of a request,
    the last one Completed or Failure."""

    executor: Executor
    model: CostModel
    config: EngineConfig
    publish: Callable[[str, Event], None]
    recorder: Recorder
    groups: DitGroups
    encoders: RolePool
    vaes: RolePool


class Runs:
    """Owns the requests of one engine."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._runs: dict[str, RequestRun] = {}
        self._unfinished: dict[str, RequestRun] = {}
        self.tenants = Tenants()

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def all(self) -> list[RequestRun]:
        return list(self._runs.values())

    @property
    def unfinished(self) -> list[RequestRun]:
        """Those with chunks still to be denoised, in order of arrival."""
        return list(self._unfinished.values())

    @property
    def vae_queue_is_long(self) -> bool:
        return self._crew.vaes.num_waiting > 2 * self._crew.vaes.num_members

    def get(self, request_id: str) -> RequestRun | None:
        return self._runs.get(request_id)

    def add(self, run: RequestRun) -> None:
        self._runs[run.request_id] = run
        self._crew.recorder.accepted(run)
        if not run.state.live:
            self.tenants.enter(run.state.tenant)

    def begin(self, run: RequestRun, undecoded: Sequence[int]) -> None:
        """Queues what is to be done for a new request first: its encoding, and the segments of `undecoded` chunks."""
        crew = self._crew
        for chunk in undecoded:
            crew.vaes.add(decode_job(run, chunk, crew.model, crew.config))
        if not run.state.has_ended:
            self._unfinished[run.request_id] = run
            crew.encoders.add(encode_job(run, crew.model, crew.config))

    def denoised(self, run: RequestRun) -> None:
        """No chunk of the request is left to be begun."""
        self._unfinished.pop(run.request_id, None)

    def hold(self, run: RequestRun, is_long: bool) -> None:
        """Keeps a request from running ahead of the VAEs, and of its keeper."""
        run.hold("vae", run.num_undecoded >= MAX_UNDECODED_CHUNKS or (is_long and run.num_undecoded > 0))
        run.hold("store", run.num_uncommitted >= MAX_UNCOMMITTED_CHUNKS)

    def play(self, run: RequestRun, now: float) -> None:
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
            self._crew.publish(run.request_id, PlayChanged(request_id=run.request_id, state=run.play_state))

    def complete(self, run: RequestRun, now: float) -> None:
        """Ends a request of which everything was delivered and kept."""
        if run.is_complete:
            self._crew.recorder.finished(run, "stop", now)
            self._crew.publish(run.request_id, Completed(request_id=run.request_id))
            self.end(run)
        elif run.failure is not None and run.num_undecoded == 0:
            self.fail(run, run.failure, now)

    def fail_after_decoding(self, run: RequestRun, failure: Failure, now: float) -> None:
        """Ends a request that cannot go on once its finished chunks are delivered."""
        if run.num_undecoded == 0:
            self.fail(run, failure, now)
        else:
            run.failure = failure
            run.state.is_cancelled = True

    def fail(self, run: RequestRun, failure: Failure, now: float) -> None:
        """Ends a request without a result, and says why."""
        self._crew.recorder.finished(run, "error", now)
        self._crew.publish(run.request_id, failure)
        self.end(run)

    def end(self, run: RequestRun) -> None:
        """Forgets a request; what still runs for it is told to stop, and its results will be dropped."""
        del self._runs[run.request_id]
        self._unfinished.pop(run.request_id, None)
        run.is_over = run.state.is_cancelled = True
        if not run.state.live:
            self.tenants.leave(run.state.tenant)
        self._crew.groups.abort(run)
        self._crew.encoders.abandon(run.request_id)
        self._crew.vaes.abandon(run.request_id)
        self._crew.executor.drop(list(run.all_refs()))
