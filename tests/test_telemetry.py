"""The metrics against the table of API.md 7, written here by hand; both text formats as their own parsers read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from helios_serve.telemetry import Metrics

E2E = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 2560)
FIRST_SEGMENT = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60)
INTER_SEGMENT = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.375, 1.5, 1.75, 2, 3, 5, 10)
STEP = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5)

# name -> type, labels beside model_name, buckets where API.md gives them
TABLE: dict[str, tuple[str, set[str], tuple[float, ...] | None]] = {
    "num_requests_running": ("gauge", set(), None),
    "num_requests_waiting": ("gauge", set(), None),
    "request_success_total": ("counter", {"finished_reason"}, None),
    "e2e_request_latency_seconds": ("histogram", {"service_class"}, E2E),
    "request_queue_time_seconds": ("histogram", {"service_class"}, None),
    "time_to_first_segment_seconds": ("histogram", {"service_class"}, FIRST_SEGMENT),
    "inter_segment_latency_seconds": ("histogram", {"service_class"}, INTER_SEGMENT),
    "realtime_factor": ("histogram", {"service_class"}, None),
    "segment_deadline_missed_total": ("counter", set(), None),
    "simulated_underrun_seconds_total": ("counter", set(), None),
    "frames_generated_total": ("counter", set(), None),
    "video_seconds_generated_total": ("counter", set(), None),
    "chunks_recomputed_total": ("counter", set(), None),
    "phase_duration_seconds": ("histogram", {"phase"}, None),
    "denoise_step_seconds": ("histogram", {"stage"}, STEP),
    "step_batch_size": ("histogram", {"stage"}, None),
    "queue_depth": ("gauge", {"role", "worker"}, None),
    "worker_up": ("gauge", {"role", "worker"}, None),
    "worker_last_progress_age_seconds": ("gauge", {"role", "worker"}, None),
    "worker_restarts_total": ("counter", {"role", "worker"}, None),
    "transfer_bytes_total": ("counter", {"src", "dst"}, None),
    "transfer_seconds": ("histogram", {"src", "dst"}, None),
    "sessions_active": ("gauge", set(), None),
    "session_credit_wait_seconds_total": ("counter", set(), None),
    "interactions_total": ("counter", {"outcome"}, None),
    "jobs": ("gauge", {"state"}, None),
    "gpu_memory_used_bytes": ("gauge", {"role", "worker"}, None),
    "artifact_store_bytes": ("gauge", set(), None),
    "admission_rejected_total": ("counter", {"reason"}, None),
    "auth_failures_total": ("counter", {"reason"}, None),
    "webhook_deliveries_total": ("counter", {"outcome"}, None),
    "idempotent_replays_total": ("counter", set(), None),
    "http_requests_total": ("counter", {"handler", "method", "status"}, None),
    "http_request_duration_seconds": ("histogram", {"handler", "method", "status"}, None),
    "grpc_requests_total": ("counter", {"handler", "method", "status"}, None),
}
ALIASED = {"num_requests_running", "num_requests_waiting", "request_success_total", "e2e_request_latency_seconds"}

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def use_every_verb(metrics: Metrics) -> None:
    metrics.requests(running=3, waiting=2)
    metrics.request_finished("realtime", "stop", e2e_s=12.0, queue_s=2.0, playback_s=5.0)
    metrics.first_segment("realtime", 1.2)
    metrics.inter_segment("realtime", 1.3)
    metrics.deadline_missed(0.25)
    metrics.frames_generated(33, 24.0)
    metrics.chunk_recomputed()
    metrics.phase("decode", 0.3)
    metrics.step(2, 0.4, 5)
    metrics.queue_depth("vae", 7)
    metrics.queue_depth("dit", 1, worker="3")
    metrics.worker_up("dit", "3", True)
    metrics.worker_progress_age("dit", "3", 1.5)
    metrics.worker_restarted("dit", "3")
    metrics.gpu_memory("dit", "3", 2**30)
    metrics.transfer("dit", "vae", 1000, 0.002)
    metrics.jobs("queued", 4)
    metrics.artifact_store(5000)
    metrics.admission_rejected("capacity_exceeded")
    metrics.auth_failed("invalid_api_key")
    metrics.idempotent_replay()
    metrics.webhook_delivery("delivered")
    metrics.sessions(2)
    metrics.credit_wait(0.5)
    metrics.interaction("applied")
    metrics.http_request("/v1/videos/{video_id}", "GET", 200, 0.1)
    metrics.grpc_request("helios.video.v1.VideoGenerationService", "GetVideo", "OK")


def full(alias: bool = False) -> Metrics:
    metrics = Metrics("m", alias="vllm" if alias else None)
    use_every_verb(metrics)
    return metrics


def families(metrics: Metrics, *, openmetrics: bool = False) -> dict[str, Metric]:
    """Name -> family, counters by the name of their samples."""
    text = metrics.render(openmetrics=openmetrics)[0].decode()
    parsed = parse_openmetrics(text) if openmetrics else parse_text(text)
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in parsed}


def values(metrics: Metrics) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(metrics).values()
        for sample in family.samples
    }


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_table(openmetrics: bool) -> None:
    found = families(full(), openmetrics=openmetrics)
    ours = {name for name in found if name.startswith("helios:")}
    assert ours == {f"helios:{name}" for name in TABLE}
    for name, (kind, labels, buckets) in TABLE.items():
        family = found[f"helios:{name}"]
        assert family.type == kind, name
        assert family.documentation, name
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {"model_name"} | labels, sample
        if buckets is not None:
            bounds = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
            assert [float(bound) for bound in bounds] == [*buckets, float("inf")], name


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_name_is_declared_before_anything_happened(openmetrics: bool) -> None:
    assert {f"helios:{name}" for name in TABLE} <= set(families(Metrics("m"), openmetrics=openmetrics))


@pytest.mark.parametrize("openmetrics", [False, True])
def test_beside_the_table_are_only_process_metrics_without_labels_of_ours(openmetrics: bool) -> None:
    others = {k: v for k, v in families(full(), openmetrics=openmetrics).items() if not k.startswith("helios:")}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_gc_collections_total"} <= set(others)
    for name, family in others.items():
        assert name.startswith(("process_", "python_")), name
        assert not any("model_name" in sample.labels for sample in family.samples)


def test_content_types() -> None:
    metrics = full()
    assert metrics.render(openmetrics=False)[1] == "text/plain; version=0.0.4; charset=utf-8"
    text, content_type = metrics.render(openmetrics=True)
    assert content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert text.endswith(b"# EOF\n")


def test_both_formats_hold_the_same_samples() -> None:
    metrics = full(alias=True)
    text, openmetrics = (
        {
            (s.name, frozenset(s.labels.items()))
            for family in families(metrics, openmetrics=o).values()
            for s in family.samples
        }
        for o in (False, True)
    )
    assert text == openmetrics


@pytest.mark.parametrize("openmetrics", [False, True])
def test_alias(openmetrics: bool) -> None:
    metrics = full(alias=True)
    found = families(metrics, openmetrics=openmetrics)
    assert {name for name in found if name.startswith("vllm:")} == {f"vllm:{name}" for name in ALIASED}
    for name in ALIASED:
        own, alias = found[f"helios:{name}"], found[f"vllm:{name}"]
        assert (alias.type, alias.documentation) == (own.type, own.documentation)
        renamed = [s._replace(name=s.name.replace("helios:", "vllm:")) for s in own.samples]
        assert alias.samples == renamed
    metrics.requests(running=9, waiting=8)
    assert values(metrics)["vllm:num_requests_running", frozenset({("model_name", "m")})] == 9


def test_no_alias_unless_asked_for() -> None:
    assert b"vllm" not in full().render(openmetrics=False)[0]


def seconds(name: str, total: float, **labels: str) -> dict[str, float]:
    """One observation of a histogram."""
    suffix = "{" + ",".join(f"{key}={value}" for key, value in sorted(labels.items())) + "}"
    return {f"{name}_count{suffix}": 1, f"{name}_sum{suffix}": total}


@pytest.mark.parametrize(
    ("use", "moved"),
    [
        (lambda m: m.requests(running=3, waiting=2), {"num_requests_running{}": 3, "num_requests_waiting{}": 2}),
        (
            lambda m: m.first_segment("offline", 2.5),
            seconds("time_to_first_segment_seconds", 2.5, service_class="offline"),
        ),
        (
            lambda m: m.inter_segment("offline", 2.5),
            seconds("inter_segment_latency_seconds", 2.5, service_class="offline"),
        ),
        (
            lambda m: m.deadline_missed(0.25),
            {"segment_deadline_missed_total{}": 1, "simulated_underrun_seconds_total{}": 0.25},
        ),
        (
            lambda m: m.frames_generated(33, 16.0),
            {"frames_generated_total{}": 33, "video_seconds_generated_total{}": 33 / 16},
        ),
        (lambda m: m.chunk_recomputed(), {"chunks_recomputed_total{}": 1}),
        (lambda m: m.phase("mux", 0.5), seconds("phase_duration_seconds", 0.5, phase="mux")),
        (
            lambda m: m.step(1, 0.5, 4),
            seconds("denoise_step_seconds", 0.5, stage="1") | seconds("step_batch_size", 4, stage="1"),
        ),
        (lambda m: m.queue_depth("vae", 7), {"queue_depth{role=vae,worker=}": 7}),
        (lambda m: m.queue_depth("dit", 7, worker="2"), {"queue_depth{role=dit,worker=2}": 7}),
        (lambda m: m.worker_up("vae", "0", True), {"worker_up{role=vae,worker=0}": 1}),
        (
            lambda m: m.worker_progress_age("vae", "0", 1.5),
            {"worker_last_progress_age_seconds{role=vae,worker=0}": 1.5},
        ),
        (lambda m: m.worker_restarted("vae", "0"), {"worker_restarts_total{role=vae,worker=0}": 1}),
        (lambda m: m.gpu_memory("dit", "0", 1024), {"gpu_memory_used_bytes{role=dit,worker=0}": 1024}),
        (
            lambda m: m.transfer("dit", "vae", 100, 0.5),
            {"transfer_bytes_total{dst=vae,src=dit}": 100} | seconds("transfer_seconds", 0.5, src="dit", dst="vae"),
        ),
        (lambda m: m.jobs("completed", 4), {"jobs{state=completed}": 4}),
        (lambda m: m.artifact_store(5000), {"artifact_store_bytes{}": 5000}),
        (lambda m: m.admission_rejected("no_worker"), {"admission_rejected_total{reason=no_worker}": 1}),
        (lambda m: m.auth_failed("origin_not_allowed"), {"auth_failures_total{reason=origin_not_allowed}": 1}),
        (lambda m: m.idempotent_replay(), {"idempotent_replays_total{}": 1}),
        (lambda m: m.webhook_delivery("dead"), {"webhook_deliveries_total{outcome=dead}": 1}),
        (lambda m: m.sessions(2), {"sessions_active{}": 2}),
        (lambda m: m.credit_wait(0.5), {"session_credit_wait_seconds_total{}": 0.5}),
        (lambda m: m.interaction("refused"), {"interactions_total{outcome=refused}": 1}),
        (
            lambda m: m.http_request("/live", "GET", 200, 0.5),
            {"http_requests_total{handler=/live,method=GET,status=200}": 1}
            | seconds("http_request_duration_seconds", 0.5, handler="/live", method="GET", status="200"),
        ),
        (
            lambda m: m.grpc_request("helios.S", "Get", "OK"),
            {"grpc_requests_total{handler=helios.S,method=Get,status=OK}": 1},
        ),
        (
            lambda m: m.request_finished("realtime", "stop", e2e_s=12.0, queue_s=2.0, playback_s=5.0),
            {"request_success_total{finished_reason=stop}": 1}
            | seconds("e2e_request_latency_seconds", 12.0, service_class="realtime")
            | seconds("request_queue_time_seconds", 2.0, service_class="realtime")
            | seconds("realtime_factor", 2.0, service_class="realtime"),
        ),
        (
            lambda m: m.request_finished("realtime", "timeout", e2e_s=12.0, queue_s=2.0, playback_s=5.0),
            {"request_success_total{finished_reason=timeout}": 1}
            | seconds("request_queue_time_seconds", 2.0, service_class="realtime"),
        ),
    ],
)
def test_a_verb_moves_its_metrics_and_no_others(use: Callable[[Metrics], None], moved: dict[str, float]) -> None:
    metrics = Metrics("m")
    before = short(metrics)
    use(metrics)
    assert {name: value for name, value in short(metrics).items() if before.get(name) != value} == moved


def short(metrics: Metrics) -> dict[str, float]:
    """Our samples as `name{label=value}` without prefix, model and buckets."""
    found = {}
    for (name, labels), value in values(metrics).items():
        if name.startswith("helios:") and not name.endswith("_bucket"):
            rest = sorted(f"{key}={text}" for key, text in labels if key != "model_name")
            found[name.removeprefix("helios:") + "{" + ",".join(rest) + "}"] = value
    return found


def test_what_nobody_has_measured_is_not_shown_as_zero() -> None:
    shown = {name.partition("{")[0] for name in short(Metrics("m"))}
    assert shown == {
        "num_requests_running",
        "num_requests_waiting",
        "sessions_active",
        *(name for name, (kind, labels, _) in TABLE.items() if kind == "counter" and not labels),
        "request_success_total",
    }


def test_two_in_one_process() -> None:
    one, other = Metrics("one"), Metrics("other", alias="vllm")
    one.chunk_recomputed()
    assert short(one)["chunks_recomputed_total{}"] == 1
    assert short(other)["chunks_recomputed_total{}"] == 0
    assert b'model_name="other"' not in one.render(openmetrics=False)[0]
    assert b"helios" not in prometheus_client.generate_latest()


def test_a_model_name_of_any_characters() -> None:
    name = 'org/he"l\\ios\n'
    (sample,) = families(Metrics(name))["helios:chunks_recomputed_total"].samples
    assert sample.labels == {"model_name": name}


def test_the_documentation_has_every_row() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    rows = [row for row in cells if len(row) == 4 and row[1] in ("C", "G", "H")]
    letters = {"counter": "C", "gauge": "G", "histogram": "H"}
    documented = {
        (name.split("`")[1], kind, frozenset(labels.replace("`", "").split(", ")) - {""}, "(v)" in name)
        for name, kind, labels, _ in rows
    }
    assert documented == {
        (name, letters[kind], frozenset(labels), name in ALIASED) for name, (kind, labels, _) in TABLE.items()
    }
