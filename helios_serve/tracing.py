"""Spans of requests: what was done for one, when, and within which trace of the caller.

Knows phases and chunks by the times that they carry, so that nothing has to be measured a second time. Without an
endpoint nothing is recorded and OpenTelemetry is not imported; a caller's trace context is passed on all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol

from helios_serve.errors import HeliosError
from helios_serve.types import Phase

Attributes = Mapping[str, str | int | float | bool]
"""Of a span. A job's id may be among them; prompts and tenants are not."""

SpanKind = Literal["server", "internal"]
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_MAX_TRACESTATE = 512  # characters, as the recommendation wants to be passed on at least
_NO_ATTRIBUTES: Attributes = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    """A place in a trace as W3C Trace Context writes it: plain text, so that it travels in headers, rows and tasks."""

    traceparent: str
    tracestate: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """As a call to another service carries it."""
        state = {"tracestate": self.tracestate} if self.tracestate else {}
        return {"traceparent": self.traceparent, **state}


def context_from(headers: Mapping[str, str]) -> TraceContext | None:
    """The caller's place in a trace, from headers with names in lower case; None where there is none, or none that is
    valid."""
    text = headers.get("traceparent", "").strip()
    found = _TRACEPARENT.fullmatch(text)
    if found is None or not text.isascii() or not text.isprintable():
        return None
    version, trace_id, span_id, more = found.groups()
    if version == "ff" or (version == "00" and more) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    state = headers.get("tracestate", "").strip()
    is_clean = state.isascii() and state.isprintable() and len(state) <= _MAX_TRACESTATE
    return TraceContext(traceparent=text[:55], tracestate=state if is_clean else "")


_current: ContextVar[TraceContext | None] = ContextVar("helios_trace_context", default=None)


@contextmanager
def bind_context(context: TraceContext | None) -> Iterator[None]:
    """What begins inside, and in tasks and threads started inside, finds `context` by `current_context`."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current_context() -> TraceContext | None:
    """The place in a trace that was bound here; None for none."""
    return _current.get()


class Span(Protocol):
    """One request while it goes on. Times are seconds of the Unix clock."""

    @property
    def context(self) -> TraceContext | None:
        """What is to be passed on with work that is done for this span elsewhere."""
        ...

    def phase(self, phase: Phase, *, chunk: int | None = None) -> None:
        """A phase of its work is done: of the chunk of that index, or of the request as a whole. A chunk's span lasts
        from its first phase to the end of `mux`, or of its last one."""
        ...

    def end(
        self, *, ended_s: float | None = None, error: str | None = None, attributes: Attributes = _NO_ATTRIBUTES
    ) -> None:
        """The request is over. ended_s: None for now. error: code of what ended it, None if it went well."""
        ...


class Tracing(Protocol):
    """Makes spans; safe to call from every thread."""

    def begin(
        self,
        name: str,
        *,
        parent: TraceContext | None,
        kind: SpanKind = "internal",
        started_s: float | None = None,
        attributes: Attributes = _NO_ATTRIBUTES,
    ) -> Span:
        """A request begins. parent: where it belongs; None begins a trace. started_s: None for now."""
        ...

    def close(self) -> None:
        """Sends what was recorded; blocks for a few seconds at most."""
        ...


def open_tracing(endpoint: str | None, *, version: str) -> Tracing:
    """Records and sends spans if there is an endpoint.

    Args:
        endpoint: of an OTLP collector over HTTP, such as `http://collector:4318`.
        version: of this service, as its spans say.

    Raises: HeliosError for an endpoint of another kind, and without the packages of the extra `otel`.
    """
    if endpoint is None:
        return NoTracing()
    if not endpoint.startswith(("http://", "https://")):
        raise HeliosError(f"otel_endpoint {endpoint}: must be the HTTP address of a collector: http://collector:4318")
    try:
        from helios_serve.tracing_otel import OtelTracing, otlp_exporter
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "opentelemetry":
            raise
        raise HeliosError("otel_endpoint: a package is missing; pip install 'helios-serve[otel]'") from error
    return OtelTracing(otlp_exporter(endpoint), version=version)


class NoTracing:
    """Records nothing, and passes on the context that it was given."""

    def begin(
        self,
        name: str,
        *,
        parent: TraceContext | None,
        kind: SpanKind = "internal",
        started_s: float | None = None,
        attributes: Attributes = _NO_ATTRIBUTES,
    ) -> Span:
        return _NoSpan(parent)

    def close(self) -> None:
        pass


class _NoSpan:
    def __init__(self, context: TraceContext | None) -> None:
        self._context = context

    @property
    def context(self) -> TraceContext | None:
        return self._context

    def phase(self, phase: Phase, *, chunk: int | None = None) -> None:
        pass

    def end(
        self, *, ended_s: float | None = None, error: str | None = None, attributes: Attributes = _NO_ATTRIBUTES
    ) -> None:
        pass
