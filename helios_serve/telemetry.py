"""The metrics of one server.

Knows names, labels and buckets of what is published (API.md 7) and nothing of who reports it. No label holds an id, a
prompt, a tenant or a path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import prometheus_client as prometheus
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_text
from prometheus_client.registry import Collector

from helios_serve.types import Role, ServiceClass

FinishedReason = Literal["stop", "abort", "error", "timeout"]
PhaseName = Literal["text_encode", "image_encode", "video_encode", "chunk", "decode", "mux", "store"]
JobState = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
InteractionOutcome = Literal["queued", "applied", "refused"]
AuthFailure = Literal["invalid_api_key", "insufficient_scope", "origin_not_allowed", "auth_throttled"]
AUTH_FAILURES: tuple[AuthFailure, ...] = get_args(AuthFailure)
WebhookOutcome = Literal["delivered", "failed", "dead"]


def _doubling(first: float, last: float) -> tuple[float, ...]:
    """first, 2 first, 4 first, ... below `last`, and `last`."""
    bounds = [first]
    while 2 * bounds[-1] < last:
        bounds.append(2 * bounds[-1])
    return (*bounds, last)


@dataclass(frozen=True, slots=True)
class _Row:
    """One metric: its name without the prefix, its meaning, its labels beside `model_name`; buckets of a histogram."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def head(self) -> tuple[str, str, tuple[str, ...]]:
        """Name, meaning and labels as they are published."""
        return f"helios:{self.name}", self.help, ("model_name", *self.labels)


_CLASS = ("service_class",)
_WORKER = ("role", "worker")
_ROLES = ("src", "dst")
_HTTP = ("handler", "method", "status")

_COUNTERS = (
    _Row("request_success_total", "Requests that ended, by what ended them.", ("finished_reason",)),
    _Row("segment_deadline_missed_total", "Segments that came after a real-time player needed them."),
    _Row("simulated_underrun_seconds_total", "Seconds that real-time players had nothing to show."),
    _Row("frames_generated_total", "Frames of published segments."),
    _Row("video_seconds_generated_total", "Playing time of published segments."),
    _Row("chunks_recomputed_total", "Chunks begun again after a fault."),
    _Row("worker_restarts_total", "Times that a worker was lost and made anew.", _WORKER),
    _Row("transfer_bytes_total", "Bytes of tensors moved between workers.", _ROLES),
    _Row("session_credit_wait_seconds_total", "Seconds that sessions stood still without credit from their clients."),
    _Row("interactions_total", "Receipts of prompt changes in sessions.", ("outcome",)),
    _Row("admission_rejected_total", "Requests refused for lack of capacity or quota, by error code.", ("reason",)),
    _Row("auth_failures_total", "Calls refused for their key, scope or origin, by error code.", ("reason",)),
    _Row("webhook_deliveries_total", "Attempts to deliver a webhook.", ("outcome",)),
    _Row("idempotent_replays_total", "Creating calls answered with an earlier call's job."),
    _Row("http_requests_total", "HTTP requests answered.", _HTTP),
    _Row("grpc_requests_total", "gRPC calls answered.", _HTTP),
)

_GAUGES = (
    _Row("num_requests_running", "Requests that have begun."),
    _Row("num_requests_waiting", "Accepted requests that have not begun."),
    _Row("queue_depth", "Tasks that wait for a worker; worker is empty where a role shares one queue.", _WORKER),
    _Row("worker_up", "1 while the worker takes tasks, else 0.", _WORKER),
    _Row("worker_last_progress_age_seconds", "Seconds since a busy worker last moved; 0 while it is idle.", _WORKER),
    _Row("sessions_active", "Interactive sessions that are open."),
    _Row("jobs", "Jobs that the server knows.", ("state",)),
    _Row("gpu_memory_used_bytes", "Memory of the worker's device that is in use.", _WORKER),
    _Row("artifact_store_bytes", "Bytes of stored videos."),
)

_HISTOGRAMS = (
    _Row("e2e_request_latency_seconds", "From acceptance to the last segment.", _CLASS, _doubling(0.5, 2560.0)),
    _Row("request_queue_time_seconds", "From acceptance to the first chunk's begin.", _CLASS, _doubling(0.1, 600.0)),
    _Row(
        "time_to_first_segment_seconds",
        "From acceptance to the first segment.",
        _CLASS,
        (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
    ),
    _Row(
        "inter_segment_latency_seconds",
        "Between two segments of a request.",
        _CLASS,
        (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.375, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0),
    ),
    _Row(
        "realtime_factor",
        "Generation seconds per second of playback; below 1 is faster than playback.",
        _CLASS,
        (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0),
    ),
    _Row("phase_duration_seconds", "Work of one phase on a worker.", ("phase",), _doubling(0.005, 60.0)),
    _Row(
        "denoise_step_seconds",
        "One transformer evaluation, counted for each request in it.",
        ("stage",),
        _doubling(0.005, 5.0),
    ),
    _Row(
        "step_batch_size",
        "Requests in one transformer evaluation, counted for each of them.",
        ("stage",),
        (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0),
    ),
    _Row("transfer_seconds", "Moving one tensor between workers.", _ROLES, _doubling(0.001, 10.0)),
    _Row(
        "http_request_duration_seconds",
        "From an HTTP request's begin to the end of its answer.",
        _HTTP,
        (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
    ),
)

_ALIASED = ("num_requests_running", "num_requests_waiting", "request_success", "e2e_request_latency_seconds")
"""Families whose meaning is the same in vLLM, as autoscaling rules know them."""


class Metrics:
    """What one server counts; several may live in a process. Safe to call from every thread.

    Args:
        alias: also publish, under this prefix, the metrics that vLLM has too.
    """

    def __init__(self, model_name: str, *, alias: Literal["vllm"] | None = None) -> None:
        registry = prometheus.CollectorRegistry()
        counters = {row.name: prometheus.Counter(*row.head, registry=registry) for row in _COUNTERS}
        gauges = {row.name: prometheus.Gauge(*row.head, registry=registry) for row in _GAUGES}
        histograms = {
            row.name: prometheus.Histogram(*row.head, buckets=row.buckets, registry=registry) for row in _HISTOGRAMS
        }
        # by name and labels, as the library takes its locks and copies the labels whenever it is asked for one
        self._counter = cache(lambda name, *labels: counters[name].labels(model_name, *labels))
        self._gauge = cache(lambda name, *labels: gauges[name].labels(model_name, *labels))
        self._histogram = cache(lambda name, *labels: histograms[name].labels(model_name, *labels))
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        prometheus.GCCollector(registry=registry)
        self._published = _Published(registry, alias)
        self._start_at_zero()

    def requests(self, *, running: int, waiting: int) -> None:
        """How many requests have begun, and how many have not."""
        self._set("num_requests_running", running)
        self._set("num_requests_waiting", waiting)

    def request_finished(
        self, service_class: ServiceClass, reason: FinishedReason, *, e2e_s: float, queue_s: float, playback_s: float
    ) -> None:
        """A request ended. Only a whole video (`stop`) tells of latency and speed: what was cut short would flatter."""
        self._add("request_success_total", 1, reason)
        self._observe("request_queue_time_seconds", queue_s, service_class)
        if reason == "stop":
            self._observe("e2e_request_latency_seconds", e2e_s, service_class)
            self._observe("realtime_factor", (e2e_s - queue_s) / playback_s, service_class)

    def first_segment(self, service_class: ServiceClass, seconds: float) -> None:
        """A request's first segment came, `seconds` after it was accepted."""
        self._observe("time_to_first_segment_seconds", seconds, service_class)

    def inter_segment(self, service_class: ServiceClass, seconds: float) -> None:
        """A later segment came, `seconds` after the one before it."""
        self._observe("inter_segment_latency_seconds", seconds, service_class)

    def deadline_missed(self, underrun_s: float) -> None:
        """A real-time segment came `underrun_s` too late for a player that began with the first one."""
        self._add("segment_deadline_missed_total", 1)
        self._add("simulated_underrun_seconds_total", underrun_s)

    def frames_generated(self, num_frames: int, fps: float) -> None:
        """A segment of `num_frames` frames, played at `fps`, was published."""
        self._add("frames_generated_total", num_frames)
        self._add("video_seconds_generated_total", num_frames / fps)

    def chunk_recomputed(self) -> None:
        """A chunk begins again, because its work was lost."""
        self._add("chunks_recomputed_total", 1)

    def phase(self, name: PhaseName, seconds: float) -> None:
        """A phase of a request's work is done."""
        self._observe("phase_duration_seconds", seconds, name)

    def step(self, stage: int, seconds: float, batch_size: int) -> None:
        """One request's step at `stage` is done, in a forward that `batch_size` requests shared."""
        self._observe("denoise_step_seconds", seconds, str(stage))
        self._observe("step_batch_size", batch_size, str(stage))

    def queue_depth(self, role: Role, depth: int, *, worker: str = "") -> None:
        """Tasks that wait for a worker, or for any worker of `role` where these share a queue."""
        self._set("queue_depth", depth, role, worker)

    def worker_up(self, role: Role, worker: str, is_up: bool) -> None:
        """`worker` is its index among those of `role`, here and below."""
        self._set("worker_up", is_up, role, worker)

    def worker_progress_age(self, role: Role, worker: str, seconds: float) -> None:
        """How long a busy worker has stood still; 0 for an idle one."""
        self._set("worker_last_progress_age_seconds", seconds, role, worker)

    def worker_restarted(self, role: Role, worker: str) -> None:
        """A worker was lost and is made anew."""
        self._add("worker_restarts_total", 1, role, worker)

    def gpu_memory(self, role: Role, worker: str, used_bytes: int) -> None:
        """Memory in use on the worker's device."""
        self._set("gpu_memory_used_bytes", used_bytes, role, worker)

    def transfer(self, src: Role, dst: Role, num_bytes: int, seconds: float) -> None:
        """A tensor moved from a worker of `src` to one of `dst`."""
        self._add("transfer_bytes_total", num_bytes, src, dst)
        self._observe("transfer_seconds", seconds, src, dst)

    def jobs(self, state: JobState, count: int) -> None:
        """How many jobs are in `state` now."""
        self._set("jobs", count, state)

    def artifact_store(self, num_bytes: int) -> None:
        """What the stored videos take now."""
        self._set("artifact_store_bytes", num_bytes)

    def admission_rejected(self, reason: str) -> None:
        """A request was refused; `reason` is the error code."""
        self._add("admission_rejected_total", 1, reason)

    def auth_failed(self, reason: AuthFailure) -> None:
        """A call was refused for what its sender may do."""
        self._add("auth_failures_total", 1, reason)

    def idempotent_replay(self) -> None:
        """A creating call was answered with an earlier call's job."""
        self._add("idempotent_replays_total", 1)

    def webhook_delivery(self, outcome: WebhookOutcome) -> None:
        """An attempt arrived, failed and will be made again, or was the last one."""
        self._add("webhook_deliveries_total", 1, outcome)

    def sessions(self, count: int) -> None:
        """How many sessions are open now."""
        self._set("sessions_active", count)

    def credit_wait(self, seconds: float) -> None:
        """A session stood still for want of credit from its client."""
        self._add("session_credit_wait_seconds_total", seconds)

    def interaction(self, outcome: InteractionOutcome) -> None:
        """A prompt change got a receipt; an accepted one gets `queued` and later `applied`."""
        self._add("interactions_total", 1, outcome)

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """An answer is complete. `handler` is the template of the route."""
        self._add("http_requests_total", 1, handler, method, str(status))
        self._observe("http_request_duration_seconds", seconds, handler, method, str(status))

    def grpc_request(self, service: str, method: str, status: str) -> None:
        """A call is complete: full name of the service, name of the method, name of the status."""
        self._add("grpc_requests_total", 1, service, method, status)

    def render(self, *, openmetrics: bool) -> tuple[bytes, str]:
        """Everything in Prometheus' text format 0.0.4 or in OpenMetrics 1.0, and its content type."""
        if not openmetrics:
            return prometheus.generate_latest(self._published), CONTENT_TYPE_PLAIN_0_0_4
        # The default escaping turns the colon of our samples, but not that of their type, into an underscore.
        text: bytes = openmetrics_text.generate_latest(  # type: ignore[no-untyped-call]
            self._published, escaping=openmetrics_text.ALLOWUTF8
        )
        return text, openmetrics_text.CONTENT_TYPE_LATEST

    def _start_at_zero(self) -> None:
        """What is known to be 0 says so: a rate over a series that begins at 1 misses its first event."""
        for row in _COUNTERS:
            if not row.labels:
                self._add(row.name, 0)
        for reason in get_args(FinishedReason):
            self._add("request_success_total", 0, reason)
        self.requests(running=0, waiting=0)
        self.sessions(0)

    def _add(self, name: str, amount: float, *labels: str) -> None:
        self._counter(name, *labels).inc(amount)

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._gauge(name, *labels).set(value)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._histogram(name, *labels).observe(value)


class _Published(Collector):
    """What a scrape sees of a registry: families of the table, aliased ones twice, without the library's `_created`."""

    def __init__(self, registry: prometheus.CollectorRegistry, alias: str | None) -> None:
        self._registry = registry
        self._alias = alias

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
            name = family.name.removeprefix("helios:")
            if self._alias is not None and name in _ALIASED:
                yield _renamed(family, f"{self._alias}:{name}")


def _renamed(family: Metric, name: str) -> Metric:
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [sample._replace(name=name + sample.name.removeprefix(family.name)) for sample in family.samples]
    return copy
