"""What happens in the engine, as metrics and spans. Knows requests' times and classes; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from helios_serve.engine.request_run import RequestRun
from helios_serve.telemetry import Metrics
from helios_serve.tracing import NoTracing, Span, Tracing, current_context
from helios_serve.types import Phase, Role, Segment

Reason = Literal["stop", "abort", "error", "timeout"]


class Recorder:
    """One for each engine."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = NoTracing() if tracing is None else tracing
        self._spans: dict[str, Span] = {}
        """Of requests that have not ended."""

    def accepted(self, run: RequestRun) -> None:
        """A request begins its way through the roles, in the trace of the call that made it."""
        self._spans[run.request_id] = self._tracing.begin(
            "generate",
            parent=current_context(),
            attributes={"helios.job_id": run.request_id, "helios.service_class": run.request.service_class},
        )

    def queues(self, *, num_running: int, num_waiting: int, depths: Mapping[Role, int]) -> None:
        """Requests that have begun their first chunk, those that have not, and waiting tasks by role."""
        self._metrics.requests(running=num_running, waiting=num_waiting)
        for role, depth in depths.items():
            self._metrics.queue_depth(role, depth)

    def finished(self, run: RequestRun, reason: Reason, now: float) -> None:
        """A request ended; shares of generation and playback are told of whole videos only."""
        error = reason if reason in ("error", "timeout") else None
        if (span := self._spans.pop(run.request_id, None)) is not None:
            span.end(error=error, attributes={"helios.finished_reason": reason})
        params, started = run.request.params, run.started_at
        self._metrics.request_finished(
            run.request.service_class,
            reason,
            e2e_s=now - run.accepted_at,
            queue_s=(now if started is None else started) - run.accepted_at,
            playback_s=params.num_output_frames / params.fps,
        )

    def refused(self, code: str) -> None:
        """A request was not admitted; `code` is the error's."""
        self._metrics.admission_rejected(code)

    def published(self, run: RequestRun, segment: Segment, stalled_s: float, now: float) -> None:
        """A segment became visible; `stalled_s` is how long a player had to wait for it."""
        service_class = run.request.service_class
        if run.last_published_at is None:
            self._metrics.first_segment(service_class, now - run.accepted_at)
        else:
            self._metrics.inter_segment(service_class, now - run.last_published_at)
        run.last_published_at = now
        if stalled_s > 0:
            self._metrics.deadline_missed(stalled_s)
        self._metrics.frames_generated(segment.num_frames, run.request.params.fps)

    def step(self, stage: int, seconds: float, batch_size: int) -> None:
        """One request's step in a forward of `batch_size` requests."""
        self._metrics.step(stage, seconds, batch_size)

    def phases(self, run: RequestRun, phases: Sequence[Phase], *, chunk: int | None = None) -> None:
        """Work on a request is done: on the chunk of that index, or on the request as a whole."""
        span = self._spans.get(run.request_id)
        for phase in phases:
            self._metrics.phase(phase.name, phase.seconds)
            if span is not None:
                span.phase(phase, chunk=chunk)

    def chunk_recomputed(self) -> None:
        self._metrics.chunk_recomputed()

    def up(self, role: Role, group: str) -> None:
        self._metrics.worker_up(role, _index(group), True)

    def lost(self, role: Role, group: str) -> None:
        """A group is gone; it will be made anew."""
        self._metrics.worker_up(role, _index(group), False)
        self._metrics.worker_restarted(role, _index(group))

    def progress_age(self, role: Role, group: str, seconds: float) -> None:
        self._metrics.worker_progress_age(role, _index(group), seconds)


def _index(group: str) -> str:
    """ "dit-3" -> "3"."""
    return group.rpartition("-")[2]
