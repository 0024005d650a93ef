"""Makes the Grafana dashboard from the metrics that the server publishes: `python deploy/grafana/build.py` writes it.

A name that `helios_serve.telemetry` does not publish, or that is asked for as the wrong kind, ends the build.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families

from helios_serve.telemetry import Metrics

DASHBOARD = Path(__file__).parent / "helios-serve.json"
PREFIX = "helios:"
FILTER = 'model_name=~"$model",instance=~"$instance"'
COLUMNS, HEIGHT = 24, 8

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and the name of its lines."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph, or one number if `is_stat`."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    is_stat: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A headline and the panels below it."""

    title: str
    panels: tuple[Panel, ...]


def published() -> dict[str, Kind]:
    """Every metric of the server with its kind; names without prefix, counters with `_total`."""
    text, _ = Metrics("any").render(openmetrics=False)
    found: dict[str, Kind] = {}
    for family in text_string_to_metric_families(text.decode()):
        if family.name.startswith(PREFIX):
            name = family.name.removeprefix(PREFIX)
            kind: Any = family.type
            found[f"{name}_total" if kind == "counter" else name] = kind
    return found


_PUBLISHED = published()


def rate(name: str, *by: str, legend: str = "", where: str = "") -> Query:
    """Events a second of a counter."""
    return Query(_sum(f"rate({_selected(name, 'counter', where)}[$__rate_interval])", by), legend or _legend(by, "all"))


def gauge(name: str, *by: str, legend: str = "", where: str = "") -> Query:
    """The sum of a gauge over what is not in `by`."""
    return Query(_sum(_selected(name, "gauge", where), by), legend or _legend(by, "all"))


def highest(name: str, *by: str) -> Query:
    """The highest of a gauge over what is not in `by`."""
    return Query(f"max{_by(by)} ({_selected(name, 'gauge')})", _legend(by, "highest"))


def quantile(name: str, share: float, *by: str, where: str = "") -> Query:
    """The value below which `share` of a histogram's events were."""
    buckets = _sum(f"rate({_selected(name, 'histogram', where, '_bucket')}[$__rate_interval])", ("le", *by))
    return Query(f"histogram_quantile({share}, {buckets})", f"{_legend(by, 'all')} p{100 * share:g}")


def mean(name: str, *by: str) -> Query:
    """The mean of a histogram's events."""
    parts = [_sum(f"rate({_selected(name, 'histogram', '', end)}[$__rate_interval])", by) for end in ("_sum", "_count")]
    return Query(" / ".join(parts), _legend(by, "mean"))


def _named(name: str, kind: Kind) -> str:
    if _PUBLISHED.get(name) != kind:
        sys.exit(f"{name}: no {kind} of the server")
    return PREFIX + name


def _selected(name: str, kind: Kind, where: str = "", end: str = "") -> str:
    return f"{_named(name, kind)}{end}{{{FILTER}{',' if where else ''}{where}}}"


def _sum(expr: str, by: tuple[str, ...]) -> str:
    return f"sum{_by(by)} ({expr})"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _legend(by: tuple[str, ...], otherwise: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in by) or otherwise


ROWS = (
    Row(
        "Now",
        (
            Panel("Running", "short", (gauge("num_requests_running"),), is_stat=True),
            Panel("Waiting", "short", (gauge("num_requests_waiting"),), is_stat=True),
            Panel("Open sessions", "short", (gauge("sessions_active"),), is_stat=True),
            Panel("Video made per second", "s", (rate("video_seconds_generated_total"),), is_stat=True),
            Panel("Workers up", "short", (gauge("worker_up", "role"),), is_stat=True),
            Panel("Stored videos", "bytes", (gauge("artifact_store_bytes"),), is_stat=True),
        ),
    ),
    Row(
        "What clients feel",
        (
            Panel(
                "Time to first segment",
                "s",
                tuple(quantile("time_to_first_segment_seconds", each, "service_class") for each in (0.5, 0.95, 0.99)),
            ),
            Panel(
                "Between segments (33 frames at 24 fps play for 1.375 s)",
                "s",
                tuple(quantile("inter_segment_latency_seconds", each, "service_class") for each in (0.5, 0.95, 0.99)),
            ),
            Panel(
                "Generation time / playing time",
                "short",
                tuple(quantile("realtime_factor", each, "service_class") for each in (0.5, 0.95)),
            ),
            Panel(
                "Late segments and stalls",
                "short",
                (
                    rate("segment_deadline_missed_total", legend="late segments /s"),
                    rate("simulated_underrun_seconds_total", legend="stalled seconds /s"),
                ),
            ),
            Panel(
                "Whole requests",
                "s",
                tuple(quantile("e2e_request_latency_seconds", each, "service_class") for each in (0.5, 0.95)),
            ),
            Panel(
                "Time in the queue",
                "s",
                tuple(quantile("request_queue_time_seconds", each, "service_class") for each in (0.5, 0.95)),
            ),
        ),
    ),
    Row(
        "Traffic",
        (
            Panel(
                "Requests",
                "short",
                (gauge("num_requests_running", legend="running"), gauge("num_requests_waiting", legend="waiting")),
            ),
            Panel(
                "Requests that ended, by what ended them", "reqps", (rate("request_success_total", "finished_reason"),)
            ),
            Panel("Refused for lack of capacity or quota", "reqps", (rate("admission_rejected_total", "reason"),)),
            Panel("Frames made", "short", (rate("frames_generated_total", legend="frames /s"),)),
            Panel("Jobs", "short", (gauge("jobs", "state"),)),
            Panel(
                "Sessions",
                "short",
                (
                    gauge("sessions_active", legend="open"),
                    rate("session_credit_wait_seconds_total", legend="waiting for credit, seconds /s"),
                    rate("interactions_total", "outcome", legend="prompt changes {{outcome}} /s"),
                ),
            ),
        ),
    ),
    Row(
        "Work",
        (
            Panel("Phases, mean", "s", (mean("phase_duration_seconds", "phase"),)),
            Panel("Phases, p95", "s", (quantile("phase_duration_seconds", 0.95, "phase"),)),
            Panel(
                "One step of the transformer",
                "s",
                (mean("denoise_step_seconds", "stage"), quantile("denoise_step_seconds", 0.95, "stage")),
            ),
            Panel("Requests in one step, mean", "short", (mean("step_batch_size", "stage"),)),
            Panel("Waiting tasks", "short", (gauge("queue_depth", "role"),)),
            Panel("Chunks begun again", "short", (rate("chunks_recomputed_total", legend="chunks /s"),)),
        ),
    ),
    Row(
        "Workers",
        (
            Panel("Up", "short", (gauge("worker_up", "role", "worker"),)),
            Panel("Silent while busy", "s", (highest("worker_last_progress_age_seconds", "role", "worker"),)),
            Panel("Lost and made anew", "short", (rate("worker_restarts_total", "role", "worker"),)),
            Panel("Memory of devices", "bytes", (gauge("gpu_memory_used_bytes", "role", "worker"),)),
            Panel("Tensors moved", "Bps", (rate("transfer_bytes_total", "src", "dst"),)),
            Panel("Moving a tensor, p95", "s", (quantile("transfer_seconds", 0.95, "src", "dst"),)),
        ),
    ),
    Row(
        "API",
        (
            Panel(
                "HTTP by route",
                "reqps",
                (rate("http_requests_total", "handler", where='handler!~"/metrics|/live|/ready|/health"'),),
            ),
            Panel("HTTP by status", "reqps", (rate("http_requests_total", "status"),)),
            Panel("HTTP, p95", "s", (quantile("http_request_duration_seconds", 0.95, "handler"),)),
            Panel("gRPC by status", "reqps", (rate("grpc_requests_total", "method", "status"),)),
            Panel(
                "Refused callers and repeated calls",
                "reqps",
                (rate("auth_failures_total", "reason"), rate("idempotent_replays_total", legend="repeated")),
            ),
            Panel("Webhooks", "reqps", (rate("webhook_deliveries_total", "outcome"),)),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "helios-serve",
        "title": "helios-serve",
        "tags": ["helios-serve"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _variable("model", "model_name"), _variable("instance", "instance")]},
        "panels": _panels(),
    }


def rendered() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "gridPos": place})
        top += 1
        is_flat = all(panel.is_stat for panel in row.panels)
        width, height = (COLUMNS // len(row.panels), HEIGHT // 2) if is_flat else (COLUMNS // 3, HEIGHT)
        per_line = COLUMNS // width
        for index, panel in enumerate(row.panels):
            line, column = divmod(index, per_line)
            place = {"x": column * width, "y": top + line * height, "w": width, "h": height}
            panels.append(_panel(len(panels) + 1, panel, place))
        top += height * -(-len(row.panels) // per_line)
    return panels


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "$datasource"}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": source, "expr": query.expr, "legendFormat": query.legend}
        for index, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "stat" if panel.is_stat else "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, label: str) -> dict[str, Any]:
    query = f"label_values({_named('num_requests_running', 'gauge')}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    DASHBOARD.write_text(rendered(), encoding="utf-8")
