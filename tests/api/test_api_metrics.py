"""GET /metrics, and how requests are counted: by template, never by what the client wrote."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.testclient import TestClient

from helios_serve.telemetry import Metrics
from tests.api.conftest import FakeEngine, client_of, parts_of

URL = "/v1/videos/generations"


def counts(client: TestClient) -> dict[tuple[str, str, str], float]:
    """(handler, method, status) -> requests, those for /metrics left out."""
    text = client.get("/metrics").text
    found: dict[tuple[str, str, str], float] = {}
    for family in parse_text(text):
        for sample in family.samples:
            if sample.name == "helios:http_requests_total" and sample.labels["handler"] != "/metrics":
                assert sample.labels["model_name"] == "helios-distilled"
                found[sample.labels["handler"], sample.labels["method"], sample.labels["status"]] = sample.value
    return found


def test_text_by_default(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    names = {family.name for family in parse_text(answer.text)}
    assert {"helios:num_requests_running", "helios:request_success", "process_resident_memory_bytes"} <= names
    assert "x-request-id" in answer.headers


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("*/*", False),
        ("", False),
        ("text/plain", False),
        ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("text/html", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        (PROMETHEUS, True),
    ],
)
def test_openmetrics_when_it_is_preferred(client: TestClient, accept: str, is_openmetrics: bool) -> None:
    answer = client.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/openmetrics-text" if is_openmetrics else "text/plain")
    families = list(parse_openmetrics(answer.text) if is_openmetrics else parse_text(answer.text))
    assert any(family.name == "helios:num_requests_running" for family in families)


def test_head(client: TestClient) -> None:
    answer = client.head("/metrics")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 1000


def test_requests_are_counted_by_template(client: TestClient) -> None:
    made = client.post(URL, json={"prompt": "p", "num_frames": 33})
    video_id = made.json()["id"]
    for _ in range(2):
        client.get(f"/v1/videos/{video_id}")
    client.get(f"/v1/videos/{video_id}/content")
    client.head(f"/v1/videos/{video_id}/content")
    client.get("/v1/videos/video_other")
    client.get("/v1/models/org/Helios-Distilled")
    client.get("/live")
    client.get("/openapi.json")
    assert counts(client) == {
        (URL, "POST", "200"): 1,
        ("/v1/videos/{video_id}", "GET", "200"): 2,
        ("/v1/videos/{video_id}/content", "GET", "200"): 1,
        ("/v1/videos/{video_id}/content", "HEAD", "200"): 1,
        ("/v1/videos/{video_id}", "GET", "404"): 1,
        ("/v1/models/{model_id:path}", "GET", "200"): 1,
        ("/live", "GET", "200"): 1,
        ("/openapi.json", "GET", "200"): 1,
    }


def test_what_clients_make_up_is_one_label(client: TestClient) -> None:
    for number in range(3):
        client.get(f"/secret-{number}")
        client.request(f"BREW{number}", "/live")
    assert counts(client) == {("other", "GET", "404"): 3, ("/live", "other", "405"): 3}


def test_refused_requests_have_their_route(client: TestClient) -> None:
    """Also a body that is refused before the router sees it."""
    client.post(URL, json={"prompt": "p" * 300_000})
    client.post(URL, content=b"{", headers={"content-type": "application/json"})
    client.put(URL, json={})
    client.post("/v1/videos/models", json={})
    assert counts(client) == {
        (URL, "POST", "413"): 1,
        (URL, "POST", "400"): 1,
        (URL, "PUT", "405"): 1,
        ("/v1/videos/models", "POST", "405"): 1,
    }


def test_no_label_holds_what_a_client_sent(client: TestClient) -> None:
    sent = {"prompt": "a crimson walrus", "num_frames": 33, "user": "someone"}
    video_id = client.post(URL, json=sent, headers={"x-request-id": "req-of-mine"}).json()["id"]
    client.get(f"/v1/videos/{video_id}/content?token=hidden", headers={"authorization": "Bearer hs_key"})
    client.get(f"/nowhere/{video_id}")
    text = client.get("/metrics").text
    for secret in (video_id, "walrus", "someone", "req-of-mine", "hidden", "hs_key", "nowhere"):
        assert secret not in text


def test_a_defect_is_counted_as_500(app: FastAPI) -> None:
    async def broken() -> None:
        raise RuntimeError("secret detail")

    app.add_api_route("/broken/{anything}", broken, methods=["GET"])
    with TestClient(app) as client:
        assert client.get("/broken/1").status_code == 500
        assert counts(client) == {("/broken/{anything}", "GET", "500"): 1}


def test_a_client_that_leaves_before_the_answer(app: FastAPI) -> None:
    async def leave() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            raise AssertionError("nobody is there")

        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        client = ("127.0.0.1", 1)
        scope = {
            "type": "http",
            "method": "POST",
            "path": URL,
            "headers": headers,
            "query_string": b"",
            "client": client,
        }
        await app(scope, receive, send)

    asyncio.run(leave())
    assert counts(client_of(app)) == {(URL, "POST", "499"): 1}


def test_duration_lasts_until_the_answer_is_complete(client: TestClient) -> None:
    client.post(URL, json={"prompt": "slow", "num_frames": 33})  # 12 steps of 50 ms
    (total,) = (
        sample.value
        for family in parse_text(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "helios:http_request_duration_seconds_sum" and sample.labels["handler"] == URL
    )
    assert 0.6 <= total < 30


def test_the_servers_own_metrics_are_shown(engine: FakeEngine, tmp_path: Path) -> None:
    """What the engine counts and what HTTP counts is one scrape; another server in the process has its own."""
    all_metrics = [Metrics("helios-distilled", alias="vllm") for _ in range(2)]
    with (
        parts_of(engine, tmp_path / "one", all_metrics[0]) as one,
        parts_of(engine, tmp_path / "two", all_metrics[1]) as two,
    ):
        clients = [client_of(one.app), client_of(two.app)]
        all_metrics[0].requests(running=7, waiting=0)
        clients[0].get("/live")
        assert 'vllm:num_requests_running{model_name="helios-distilled"} 7.0' in clients[0].get("/metrics").text
        assert 'vllm:num_requests_running{model_name="helios-distilled"} 0.0' in clients[1].get("/metrics").text
        assert counts(clients[0]) == {("/live", "GET", "200"): 1}
        assert counts(clients[1]) == {}


def test_openapi_names_both_formats(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]
    assert set(operation["responses"]["200"]["content"]) == {"text/plain", "application/openmetrics-text"}
