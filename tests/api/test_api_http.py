"""Answers, error shapes, headers, stored content and isolation of jobs, over the real application."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from helios_serve.api.auth import ANONYMOUS
from helios_serve.api.middleware import error_response
from helios_serve.errors import CapacityError, InvalidRequestError
from helios_serve.types import VideoRequest
from tests.api.conftest import Parts

URL = "/v1/videos/generations"


def _post(client: TestClient, prompt: str = "p", **body: Any) -> dict[str, Any]:
    answer = client.post(URL, json={"prompt": prompt, "num_frames": 33, **body})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_generation_answer(client: TestClient) -> None:
    result = _post(client, num_frames=132, seed=42, negative_prompt="n", helios={"steps": [2, 2, 2]})
    assert result["object"] == "video.generation"
    assert (result["model"], result["size"], result["seconds"]) == ("helios-distilled", "640x384", "5.5")
    content = f"http://127.0.0.1/v1/videos/{result['id']}/content"
    assert result["data"] == [{"url": content, "b64_json": None, "revised_prompt": None}]
    # gpu_seconds: 12 steps of the amplified first chunk and 3 x 6 more, 2 ms each
    assert result["usage"] == {"num_frames": 132, "num_chunks": 4, "video_seconds": 5.5, "gpu_seconds": 0.06}
    helios = result["helios"]
    assert (helios["seed"], helios["fps"], helios["steps"]) == (42, 24, [2, 2, 2])
    assert helios["warnings"][0]["param"] == "negative_prompt"
    assert 0 <= helios["timing"]["first_segment_ms"] <= helios["timing"]["total_ms"]
    assert client.get(content).content == b"INIT[p:0][p:1][p:2][p:3]"


def test_b64_json(client: TestClient) -> None:
    item = _post(client, response_format="b64_json")["data"][0]
    assert item["url"] is None
    assert base64.b64decode(item["b64_json"]) == b"INIT[p:0]"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("video/mp4", "video/mp4"),
        ("video/mp4, */*;q=0.8", "video/mp4"),
        ("video/mp4, */*", "video/mp4"),
        ("video/mp4;q=0.5, application/json", "application/json"),
        ("application/json, video/mp4", "application/json"),
        ("*/*", "application/json"),
    ],
)
def test_accept(client: TestClient, accept: str, content_type: str) -> None:
    answer = client.post(URL, json={"prompt": "p", "num_frames": 33, "seed": 7}, headers={"accept": accept})
    assert answer.headers["content-type"] == content_type
    if content_type == "video/mp4":
        assert answer.content == b"INIT[p:0]"
        assert answer.headers["x-seed"] == "7"
        assert "total;dur=" in answer.headers["server-timing"]
        assert client.get(f"/v1/videos/{answer.headers['x-video-id']}").json()["status"] == "completed"


def test_video_object(client: TestClient) -> None:
    made = _post(client, num_frames=40, fps=16, seed=1, user="u", metadata={"k": "v"})
    video = client.get(f"/v1/videos/{made['id']}").json()
    assert (video["id"], video["object"], video["status"], video["progress"]) == (made["id"], "video", "completed", 100)
    assert (video["prompt"], video["size"], video["seconds"], video["error"]) == ("p", "640x384", "2.5", None)
    assert video["created_at"] <= video["completed_at"]
    helios = video["helios"]
    assert (helios["state"], helios["num_frames"], helios["chunks_done"], helios["fps"]) == ("completed", 40, 2, 16)
    assert (helios["user"], helios["metadata"]) == ("u", {"k": "v"})
    assert helios["urls"]["content"] == made["data"][0]["url"]
    head = client.head(f"/v1/videos/{made['id']}")
    assert (head.status_code, head.headers["content-type"]) == (200, "application/json")


@pytest.mark.parametrize(
    ("header", "status", "body", "content_range"),
    [
        ("bytes=0-3", 206, b"INIT", "bytes 0-3/9"),
        ("bytes=4-", 206, b"[p:0]", "bytes 4-8/9"),
        ("bytes=-2", 206, b"0]", "bytes 7-8/9"),
        ("bytes=8-99", 206, b"]", "bytes 8-8/9"),
        ("bytes=0-1,3-4", 200, b"INIT[p:0]", None),
        ("bytes=5-2", 200, b"INIT[p:0]", None),
        ("bytes=-", 200, b"INIT[p:0]", None),
        ("chunks=1-2", 200, b"INIT[p:0]", None),
    ],
)
def test_range(client: TestClient, header: str, status: int, body: bytes, content_range: str | None) -> None:
    url = _post(client)["data"][0]["url"]
    answer = client.get(url, headers={"range": header})
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers.get("content-range") == content_range
    assert answer.headers["content-length"] == str(len(body))
    head = client.head(url, headers={"range": header})
    assert (head.status_code, head.headers["content-length"], head.content) == (status, str(len(body)), b"")


@pytest.mark.parametrize("header", ["bytes=9-", "bytes=-0", "bytes=100-200"])
def test_range_beyond_the_end(client: TestClient, header: str) -> None:
    answer = client.get(_post(client)["data"][0]["url"], headers={"range": header})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */9"
    assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_etag(client: TestClient) -> None:
    url = _post(client)["data"][0]["url"]
    first = client.get(url)
    etag = first.headers["etag"]
    assert first.headers["accept-ranges"] == "bytes"
    assert "immutable" in first.headers["cache-control"]
    assert client.get(url, headers={"if-none-match": f'"x", W/{etag}'}).status_code == 304
    assert client.get(url, headers={"range": "bytes=0-0", "if-range": etag}).status_code == 206
    assert client.get(url, headers={"range": "bytes=0-0", "if-range": '"old"'}).status_code == 200
    assert client.get(_post(client, "other")["data"][0]["url"]).headers["etag"] != etag


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/health/", 404, "route_not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", URL, 405, "method_not_allowed"),
        ("DELETE", URL, 405, "method_not_allowed"),
        ("GET", "/v1/videos/video_0", 404, "video_not_found"),
        ("GET", "/v1/videos/video_0/content", 404, "video_not_found"),
        ("GET", "/v1/videos/..%2F..%2Fetc%2Fpasswd/content", 404, "route_not_found"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
        ("GET", "/v1/videos/x/content?variant=poster", 400, "invalid_value"),
    ],
)
def test_error_shape(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", None])
def test_other_content_type(client: TestClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = client.post(URL, content=b'{"prompt": "p"}', headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_json_with_charset(client: TestClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(URL, content='{"prompt": "\u00e9"}'.encode(), headers=headers).status_code == 200


def test_not_acceptable(client: TestClient) -> None:
    answer = client.post(URL, json={"prompt": "p"}, headers={"accept": "image/png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (406, "not_acceptable")


def test_body_limit(client: TestClient) -> None:
    body = b'{"prompt": "' + b"p" * 200_000 + b'"}'
    headers = {"content-type": "application/json"}
    answer = client.post(URL, content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.headers["x-request-id"]
    assert client.post(URL, json={"prompt": "p" * 32_000}).status_code == 200
    assert client.post("/v1/models", content=b"x" * (2**20 + 1)).status_code == 413


def test_request_id(client: TestClient) -> None:
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for refused in ("", "x" * 129, "tab\there", "caf\u00e9".encode().decode("latin-1")):
        answer = client.get("/health", headers={b"x-request-id": refused.encode("latin-1")})
        assert answer.headers["x-request-id"].startswith("req_")
    answers = {client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(answers) == 3


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    item = listed["data"][0]
    assert (item["id"], item["object"], item["owned_by"]) == ("helios-distilled", "model", "helios")
    details = item["helios"]
    assert (details["variant"], details["tasks"], details["frames_per_chunk"]) == (
        "distilled",
        ["t2v", "i2v", "v2v"],
        33,
    )
    assert (details["size_multiple"], details["recommended_sizes"], details["max_frames"]) == (64, ["640x384"], 7260)
    assert (details["default_steps"], details["example_prompt"]) == ([2, 2, 2], None)
    for path in ("/v1/models/helios-distilled", "/v1/models/org/Helios-Distilled"):
        assert client.get(path).json() == item
    assert client.get("/v1/videos/models").json() == listed
    assert client.head("/v1/models").status_code == 200


def test_operations(client: TestClient, engine: Any) -> None:
    assert client.get("/live").status_code == 200
    assert client.get("/version").json() == {"version": "1.2.3", "model": "helios-distilled"}
    assert client.get("/health").json() == {"status": "ok"}
    engine.ready = False
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "not_ready")
    assert client.get("/live").status_code == 200


@pytest.mark.parametrize(
    ("prompt", "status", "code", "error_type"),
    [
        ("fail generation_failed", 500, "generation_failed", "server_error"),
        ("fail never_heard_of", 500, "never_heard_of", "server_error"),
        ("fail worker_lost", 503, "worker_lost", "server_error"),
        ("fail queue_timeout", 504, "queue_timeout", "server_error"),
        ("fail invalid_value", 400, "invalid_value", "invalid_request_error"),
        ("mute", 500, "generation_failed", "server_error"),
        ("crash", 500, "internal_error", "server_error"),
    ],
)
def test_failed_job(client: TestClient, engine: Any, prompt: str, status: int, code: str, error_type: str) -> None:
    answer = client.post(URL, json={"prompt": prompt})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, error_type)
    assert "secret detail" not in answer.text
    assert ("retry-after" in answer.headers) == (code in ("worker_lost", "internal_error"))
    video_id = engine.requests[-1].request_id
    video = client.get(f"/v1/videos/{video_id}")
    assert (video.status_code, video.json()["status"], video.json()["error"]) == (200, "failed", error)
    content = client.get(f"/v1/videos/{video_id}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (409, "video_failed")
    assert _post(client)["id"] != video_id


def test_defect_is_logged_under_the_request_id(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("helios_serve.api.system_routes.model_object", lambda *_: 1 / 0)
    answer = client.get("/v1/models", headers={"x-request-id": "abc"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == "abc"
    assert "ZeroDivisionError" in caplog.text
    assert "abc" in caplog.text


def test_eight_posts_at_once(client: TestClient, engine: Any) -> None:
    prompts = ["slow", "slow", "fail generation_failed", "a", "b", "crash", "c", "slow"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: client.post(URL, json={"prompt": p, "num_frames": 33}), prompts))
    assert [a.status_code for a in answers] == [200, 200, 500, 200, 200, 500, 200, 200]
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.status_code == 200:
            assert client.get(answer.json()["data"][0]["url"]).content == f"INIT[{prompt}:0]".encode()
    assert engine.max_active >= 3
    assert engine.num_active == 0


def test_a_running_job_is_visible(client: TestClient, engine: Any) -> None:
    video = client.post("/v1/videos", json={"prompt": "slow", "num_frames": 330})
    assert video.json()["status"] in ("queued", "in_progress")
    video_id = video.json()["id"]
    seen = client.get(f"/v1/videos/{video_id}")
    assert 0 <= seen.json()["progress"] < 100
    assert 250 <= int(seen.headers["openai-poll-after-ms"]) <= 5000
    content = client.get(f"/v1/videos/{video_id}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (409, "video_not_ready")
    assert content.headers["x-should-retry"] == "false"
    cancelled = client.post(f"/v1/videos/{video_id}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert engine.cancelled == [video_id]


def test_a_server_that_is_full_says_so(client: TestClient, engine: Any) -> None:
    engine.refusal = CapacityError("full", retry_after_s=7.2)
    answer = client.post(URL, json={"prompt": "p"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "capacity_exceeded")
    assert answer.headers["retry-after"] == "8"
    assert client.get("/v1/videos").json()["data"] == []


def test_a_stream_that_is_realtime_by_default_only_becomes_offline(client: TestClient, engine: Any) -> None:
    def check(request: VideoRequest) -> None:
        if request.service_class == "realtime":
            raise InvalidRequestError("fps 24 is more than this server sustains", code="rate_not_sustainable")

    engine.check = check
    answer = client.post(URL, json={"prompt": "p", "num_frames": 33, "stream": True}, headers={"accept": "video/mp4"})
    assert answer.status_code == 200
    video = client.get(f"/v1/videos/{answer.headers['x-video-id']}").json()
    assert video["helios"]["steps"] == [1, 1, 1]
    assert [warning["param"] for warning in video["helios"]["warnings"]] == ["service_class"]
    asked = {"prompt": "p", "stream": True, "helios": {"service_class": "realtime"}}
    refused = client.post(URL, json=asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "rate_not_sustainable")


def test_a_call_that_would_outlast_its_client_is_refused(client: TestClient, engine: Any) -> None:
    """132 frames at 12 a second take 11 s."""
    body = {"prompt": "p", "num_frames": 132}
    refused = client.post(URL, json=body, headers={"x-stainless-read-timeout": "10.5"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "sync_too_long")
    assert "Prefer: respond-async" in error["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert engine.requests == []
    for headers, extra in (
        ({"x-stainless-read-timeout": "600"}, {}),
        ({"x-stainless-read-timeout": "10", "prefer": "wait=5"}, {}),
        ({"x-stainless-read-timeout": "10"}, {"stream": True}),
    ):
        assert client.post(URL, json=body | extra, headers=headers).status_code == 200


def test_a_job_that_is_shown_has_no_pictures(client: TestClient, parts: Parts, engine: Any) -> None:
    image = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    video_id = _post(client, image=image)["id"]
    assert engine.requests[-1].image is not None
    assert client.portal is not None
    job = client.portal.call(parts.service.get, ANONYMOUS, video_id)
    assert (job.request.image, job.request.video) == (None, None)


@pytest.mark.parametrize(("estimate", "told"), [(None, "1"), (0.2, "1"), (7.5, "8"), (4000.0, "120")])
def test_a_refusal_says_when_to_try_again(estimate: float | None, told: str) -> None:
    answer = error_response(CapacityError("full", retry_after_s=estimate))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, told)


def test_only_pure_asgi_middleware(app: FastAPI) -> None:
    from starlette.middleware.base import BaseHTTPMiddleware

    kinds = [middleware.cls for middleware in app.user_middleware]
    names = [kind.__name__ for kind in kinds]  # type: ignore[attr-defined]
    assert names == ["RequestCount", "Cors", "RequestBoundary", "HeadLimit", "BodyLimit"]
    assert not any(isinstance(kind, type) and issubclass(kind, BaseHTTPMiddleware) for kind in kinds)


def test_openapi_document(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["info"]["version"] == "1.2.3"
    operation = document["paths"][URL]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert "prompt" in body["example"]
    assert _post(client, **{k: v for k, v in body["example"].items() if k != "prompt"})
    components = document["components"]["schemas"]
    for name in ("GenerationBody", "HeliosParams", "PromptEntry", "Generation", "Video", "ErrorAnswer"):
        assert name in components
    for name in ("GenerationBody", "ExtensionBody", "RemixBody"):
        assert components[name]["additionalProperties"] is False
    for status in ("400", "422", "503"):
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert "video/mp4" in operation["responses"]["200"]["content"]
