"""Spans as OpenTelemetry's own exporter and a collector receive them; nothing at all without an endpoint."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from helios_serve.errors import HeliosError
from helios_serve.tracing import (
    NoTracing,
    TraceContext,
    bind_context,
    context_from,
    current_context,
    open_tracing,
)
from helios_serve.tracing_otel import OtelTracing
from helios_serve.types import Phase

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = TraceContext(traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="vendor=1")
UNSAMPLED = TraceContext(traceparent=f"00-{TRACE}-{SPAN}-00")

Spans = dict[str, ReadableSpan]


class Recorded:
    """Tracing whose spans can be looked at once it is closed."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = OtelTracing(self._exporter, version="1.2.3")

    def in_order(self) -> list[ReadableSpan]:
        """By the time of their end being told."""
        self.tracing.close()
        return list(self._exporter.get_finished_spans())

    def spans(self) -> Spans:
        found = self.in_order()
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def phase(name: str, started_s: float, ended_s: float) -> Phase:
    return Phase(name=name, started_s=started_s, ended_s=ended_s)  # type: ignore[arg-type]


def times(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def test_a_request_its_chunks_and_their_phases_with_the_times_that_workers_measured(recorded: Recorded) -> None:
    span = recorded.tracing.begin("generate", parent=None, started_s=1000.0, attributes={"helios.job_id": "video_1"})
    span.phase(phase("text_encode", 1000.5, 1001.0))
    span.phase(phase("chunk", 1001.0, 1003.0), chunk=0)
    span.phase(phase("chunk", 1003.0, 1005.0), chunk=1)
    span.phase(phase("decode", 1003.5, 1004.0), chunk=0)
    span.phase(phase("mux", 1004.0, 1004.25), chunk=0)
    span.end(ended_s=1006.0, attributes={"helios.finished_reason": "stop"})

    spans = recorded.in_order()
    by_name: dict[str, list[ReadableSpan]] = {}
    for each in spans:
        by_name.setdefault(each.name, []).append(each)
    (request,) = by_name["generate"]
    assert times(request) == (1000.0, 1006.0)
    assert request.attributes == {"helios.job_id": "video_1", "helios.finished_reason": "stop"}
    assert request.status.is_unset
    (encode,) = by_name["text_encode"]
    assert times(encode) == (1000.5, 1001.0)
    assert parent_of(encode) == id_of(request)
    (first,), (second,) = by_name["chunk 0"], by_name["chunk 1"]
    assert times(first) == (1001.0, 1004.25)
    assert times(second) == (1003.0, 1005.0)
    assert {parent_of(first), parent_of(second)} == {id_of(request)}
    assert [(times(each), parent_of(each)) for each in by_name["chunk"]] == [
        ((1001.0, 1003.0), id_of(first)),
        ((1003.0, 1005.0), id_of(second)),
    ]
    assert parent_of(by_name["mux"][0]) == parent_of(by_name["decode"][0]) == id_of(first)
    assert len(spans) == 8


def test_the_callers_trace_goes_on_and_is_passed_on(recorded: Recorded) -> None:
    span = recorded.tracing.begin("POST /v1/videos", parent=PARENT, kind="server")
    inner = recorded.tracing.begin("generate", parent=span.context)
    inner.end()
    span.end()
    spans = recorded.spans()
    outer = spans["POST /v1/videos"]
    assert outer.kind is trace.SpanKind.SERVER
    assert outer.parent is not None
    assert outer.parent.is_remote
    assert outer.parent.span_id == int(SPAN, 16)
    assert parent_of(spans["generate"]) == id_of(outer)
    assert {each.get_span_context().trace_id for each in spans.values()} == {int(TRACE, 16)}  # type: ignore[union-attr]
    assert span.context is not None
    assert span.context.headers == {
        "traceparent": f"00-{TRACE}-{id_of(outer):016x}-01",
        "tracestate": "vendor=1",
    }


def test_what_the_caller_does_not_sample_is_not_sent_but_passed_on(recorded: Recorded) -> None:
    span = recorded.tracing.begin("x", parent=UNSAMPLED)
    span.phase(phase("chunk", 1.0, 2.0), chunk=0)
    assert span.context is not None
    assert span.context.traceparent.startswith(f"00-{TRACE}-")
    assert span.context.traceparent.endswith("-00")
    span.end()
    assert recorded.spans() == {}


def test_a_span_that_other_code_made_current_is_not_the_parent(recorded: Recorded) -> None:
    foreign = trace.NonRecordingSpan(
        trace.SpanContext(trace_id=7, span_id=7, is_remote=False, trace_flags=trace.TraceFlags(1))
    )
    with trace.use_span(foreign):
        recorded.tracing.begin("x", parent=None).end()
    assert recorded.spans()["x"].parent is None


def test_a_failure_is_an_error(recorded: Recorded) -> None:
    span = recorded.tracing.begin("x", parent=None, started_s=1.0)
    span.phase(phase("chunk", 2.0, 3.0), chunk=4)
    span.end(error="worker_lost", ended_s=5.0)
    spans = recorded.in_order()
    assert [each.name for each in spans] == ["chunk", "chunk 4", "x"]
    assert times(spans[1]) == (2.0, 3.0)
    assert spans[1].attributes == {"helios.chunk": 4}
    assert spans[2].status.status_code is trace.StatusCode.ERROR
    assert spans[2].status.description == "worker_lost"
    assert spans[2].attributes == {"error.type": "worker_lost"}


def test_a_clock_that_was_set_back_makes_no_negative_span(recorded: Recorded) -> None:
    span = recorded.tracing.begin("x", parent=None, started_s=1.0)
    span.phase(phase("text_encode", 10.0, 9.0))
    span.end(ended_s=11.0)
    assert times(recorded.spans()["text_encode"]) == (10.0, 10.0)


def test_without_times_it_is_now(recorded: Recorded) -> None:
    before = time.time()
    recorded.tracing.begin("x", parent=None).end()
    started, ended = times(recorded.spans()["x"])
    assert before - 0.001 <= started <= ended <= time.time() + 0.001


def test_the_service_names_itself(recorded: Recorded) -> None:
    recorded.tracing.begin("x", parent=None).end()
    resource = recorded.spans()["x"].resource.attributes
    assert (resource["service.name"], resource["service.version"]) == ("helios-serve", "1.2.3")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-what.a.later.version.adds",
        f"00-{TRACE}-{SPAN}-01",
        f" 00-{TRACE}-{SPAN}-00 ",
    ],
)
def test_a_traceparent_is_taken_where_opentelemetry_takes_it(text: str) -> None:
    theirs = trace.get_current_span(
        TraceContextTextMapPropagator().extract({"traceparent": text}, Context())
    ).get_span_context()
    ours = context_from({"traceparent": text})
    assert (ours is not None) == theirs.is_valid
    if ours is not None:
        assert ours.traceparent[3:52] == f"{theirs.trace_id:032x}-{theirs.span_id:016x}"


@given(st.text(max_size=80), st.text(max_size=600))
def test_no_header_breaks_anything(traceparent: str, tracestate: str) -> None:
    found = context_from({"traceparent": traceparent, "tracestate": tracestate})
    assert found is None or found.traceparent in traceparent
    kept = context_from({"traceparent": PARENT.traceparent, "tracestate": tracestate})
    assert kept is not None
    assert kept.tracestate in tracestate
    assert kept.tracestate.isprintable()


def test_a_context_follows_tasks_and_does_not_leak() -> None:
    async def look() -> TraceContext | None:
        return await asyncio.create_task(asyncio.to_thread(current_context))

    with bind_context(PARENT):
        assert asyncio.run(look()) == PARENT
    assert current_context() is None


def test_without_an_endpoint_contexts_pass_through_and_nothing_else_happens() -> None:
    tracing = open_tracing(None, version="1")
    assert isinstance(tracing, NoTracing)
    span = tracing.begin("x", parent=PARENT)
    span.phase(phase("chunk", 1.0, 2.0), chunk=0)
    span.end(error="no")
    tracing.close()
    assert span.context == PARENT
    assert tracing.begin("y", parent=None).context is None


def test_opentelemetry_is_imported_only_with_an_endpoint() -> None:
    code = (
        "import sys; from helios_serve.tracing import open_tracing; open_tracing(None, version='1');"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules), 'imported';"
        "open_tracing('http://127.0.0.1:9', version='1');"
        "assert 'opentelemetry.sdk' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_endpoint_that_cannot_be_used_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HeliosError, match="must be the HTTP address of a collector"):
        open_tracing("collector:4317", version="1")
    monkeypatch.delitem(sys.modules, "helios_serve.tracing_otel")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(HeliosError, match=r"pip install 'helios-serve\[otel\]'"):
        open_tracing("http://collector:4318", version="1")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A collector's address, and what was sent there: path and body."""
    received: list[tuple[str, bytes]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_a_collector_gets_the_spans(
    collector: tuple[str, list[tuple[str, bytes]]], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    address, received = collector
    tracing = open_tracing(address + suffix, version="1.2.3")
    span = tracing.begin("generate", parent=PARENT, started_s=1000.0)
    span.phase(phase("chunk", 1001.0, 1003.0), chunk=0)
    span.end(ended_s=1004.0)
    tracing.close()
    assert [path for path, _ in received] == ["/v1/traces"]
    request = ExportTraceServiceRequest.FromString(received[0][1])
    spans = {each.name: each for each in request.resource_spans[0].scope_spans[0].spans}
    assert set(spans) == {"generate", "chunk 0", "chunk"}
    assert spans["generate"].trace_id.hex() == TRACE
    assert spans["chunk"].start_time_unix_nano == 1001 * 10**9
    assert spans["chunk 0"].end_time_unix_nano == 1003 * 10**9


def test_a_collector_that_is_away_stops_nobody() -> None:
    tracing = open_tracing("http://127.0.0.1:9", version="1")
    tracing.begin("x", parent=None).end()
    started = time.monotonic()
    tracing.close()
    assert time.monotonic() - started < 10
