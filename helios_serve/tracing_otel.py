"""Spans by OpenTelemetry's SDK, sent over OTLP. Imported only where an endpoint is configured.

Has a provider of its own: the process-wide one stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from helios_serve.tracing import Attributes, SpanKind, TraceContext
from helios_serve.types import Phase

SERVICE_NAME = "helios-serve"
EXPORT_TIMEOUT_S = 5
_PATH = "/v1/traces"
_NO_ATTRIBUTES: Attributes = {}
_KINDS = {"server": trace.SpanKind.SERVER, "internal": trace.SpanKind.INTERNAL}
_propagator = TraceContextTextMapPropagator()


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends to `endpoint`, a collector's HTTP address. Headers, certificates and the like come from the variables that
    OpenTelemetry defines (`OTEL_EXPORTER_OTLP_...`)."""
    base = endpoint.rstrip("/")
    return OTLPSpanExporter(base if base.endswith(_PATH) else base + _PATH, timeout=EXPORT_TIMEOUT_S)


class OtelTracing:
    """Implements `tracing.Tracing`. Sampling follows the caller's decision, else `OTEL_TRACES_SAMPLER`."""

    def __init__(self, exporter: SpanExporter, *, version: str) -> None:
        resource = Resource.create({"service.name": SERVICE_NAME, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE_NAME, version)

    def begin(
        self,
        name: str,
        *,
        parent: TraceContext | None,
        kind: SpanKind = "internal",
        started_s: float | None = None,
        attributes: Attributes = _NO_ATTRIBUTES,
    ) -> OtelSpan:
        span = self._tracer.start_span(
            name,
            # An empty context, not None: a span that other code made current is not ours.
            context=_propagator.extract({} if parent is None else parent.headers, Context()),
            kind=_KINDS[kind],
            start_time=_ns(started_s),
            attributes=dict(attributes),
        )
        return OtelSpan(self._tracer, span)

    def close(self) -> None:
        self._provider.shutdown()


@dataclass(slots=True)
class _Chunk:
    span: trace.Span
    ended_s: float


@dataclass(slots=True)
class OtelSpan:
    """Implements `tracing.Span`. Belongs to one thread or event loop."""

    _tracer: trace.Tracer
    _span: trace.Span
    _chunks: dict[int, _Chunk] = field(default_factory=dict)
    """Those that have begun and not ended."""

    @property
    def context(self) -> TraceContext:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return TraceContext(traceparent=carrier["traceparent"], tracestate=carrier.get("tracestate", ""))

    def phase(self, phase: Phase, *, chunk: int | None = None) -> None:
        if chunk is None:
            self._record(phase, self._span)
            return
        if chunk not in self._chunks:
            span = self._child(f"chunk {chunk}", self._span, phase.started_s, {"helios.chunk": chunk})
            self._chunks[chunk] = _Chunk(span, phase.ended_s)
        open_chunk = self._chunks[chunk]
        open_chunk.ended_s = max(open_chunk.ended_s, phase.ended_s)
        self._record(phase, open_chunk.span)
        if phase.name == "mux":
            self._end_chunk(chunk)

    def end(
        self, *, ended_s: float | None = None, error: str | None = None, attributes: Attributes = _NO_ATTRIBUTES
    ) -> None:
        for chunk in list(self._chunks):
            self._end_chunk(chunk)
        self._span.set_attributes(dict(attributes))
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(_ns(ended_s))

    def _record(self, phase: Phase, parent: trace.Span) -> None:
        span = self._child(phase.name, parent, phase.started_s, {"helios.phase": phase.name})
        span.end(_ns(phase.started_s + phase.seconds))

    def _child(self, name: str, parent: trace.Span, started_s: float, attributes: Attributes) -> trace.Span:
        context = trace.set_span_in_context(parent, Context())
        return self._tracer.start_span(name, context=context, start_time=_ns(started_s), attributes=dict(attributes))

    def _end_chunk(self, chunk: int) -> None:
        ended = self._chunks.pop(chunk)
        ended.span.end(_ns(ended.ended_s))


def _ns(seconds: float | None) -> int | None:
    """Nanoseconds, as the SDK counts; None means now to it."""
    return None if seconds is None else round(seconds * 1e9)
