"""A real server on a real socket: the unmodified OpenAI SDK, clients that leave, and arbitrary JSON."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from helios_serve.api.schemas import (
    FIELD_ALIASES,
    HELIOS_ALIASES,
    HELIOS_CONTAINERS,
    GenerationBody,
    HeliosParams,
    PromptEntry,
    VideoReference,
)

URL = "/v1/videos/generations"


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openai_sdk(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        made: Any = client.post(
            "/videos/generations", body={"prompt": "p", "num_frames": 33, "seconds": "7"}, cast_to=object
        )
        assert made["data"][0]["url"] == f"{server}/v1/videos/{made['id']}/content"
        video = client.videos.retrieve(made["id"])
        assert (video.id, video.status, video.progress, video.seconds) == (made["id"], "completed", 100, "1.375")
        assert client.videos.download_content(made["id"]).read() == b"INIT[p:0]"
        assert [model.id for model in client.models.list()] == ["helios-distilled"]
        assert client.models.retrieve("helios-distilled").owned_by == "helios"
        with pytest.raises(openai.NotFoundError) as missing:
            client.videos.retrieve("video_0")
        assert missing.value.code == "video_not_found"
        assert missing.value.request_id is not None
        with pytest.raises(openai.BadRequestError) as bad:
            client.post("/videos/generations", body={"prompt": "p", "num_frames": 0}, cast_to=object)
        assert (bad.value.param, bad.value.code, bad.value.type) == (
            "num_frames",
            "invalid_value",
            "invalid_request_error",
        )
        with pytest.raises(openai.InternalServerError):
            client.post("/videos/generations", body={"prompt": "fail generation_failed"}, cast_to=object)


def test_head_and_range_over_a_socket(server: str) -> None:
    with httpx2.Client(base_url=server) as client:
        video_id = client.post(URL, json={"prompt": "p", "num_frames": 33}).json()["id"]
        for path in (f"/v1/videos/{video_id}", f"/v1/videos/{video_id}/content", "/v1/models", "/health"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers["content-length"] == str(len(get.content))
        assert client.get(f"/v1/videos/{video_id}/content", headers={"range": "bytes=4-8"}).content == b"[p:0]"


def test_body_limit_counts_chunks(server: str, engine: Any) -> None:
    raw = b'{"prompt": "p", "user": "' + b"u" * 200_000 + b'"}'
    pieces = (raw[start : start + 1000] for start in range(0, len(raw), 1000))
    answer = httpx2.post(server + URL, content=pieces, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.headers["x-request-id"]
    assert engine.requests == []


@pytest.mark.parametrize("host", ["[::1", "a b", "]", "x:99999", "", "\x7f", "a/b?c#d"])
def test_odd_host_header_is_no_defect(server: str, host: str) -> None:
    address = urlsplit(server)
    raw = b'{"prompt": "p", "num_frames": 1}'
    head = f"POST {URL} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        status = int(connection.makefile("rb").readline().split()[1])
    assert status in (400, 403)


def _post_and_leave(server: str, body: dict[str, Any], engine: Any) -> str:
    """Sends a request, waits until the engine has it, and closes the connection; returns the video's id."""
    address = urlsplit(server)
    raw = json.dumps(body).encode()
    head = f"POST {URL} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(raw)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + raw)
        _wait_for(lambda: len(engine.requests) == 1)
    video_id: str = engine.requests[0].request_id
    return video_id


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_client_that_leaves_cancels_its_job(server: str, engine: Any) -> None:
    video_id = _post_and_leave(server, {"prompt": "slow"}, engine)
    _wait_for(lambda: engine.cancelled == [video_id])
    video = httpx2.get(f"{server}/v1/videos/{video_id}").json()
    assert (video["status"], video["error"]["code"], video["helios"]["state"]) == ("failed", "cancelled", "cancelled")
    assert engine.num_active == 0


def test_detached_job_goes_on(server: str, engine: Any) -> None:
    video_id = _post_and_leave(server, {"prompt": "slow", "num_frames": 33, "detach": True}, engine)
    _wait_for(lambda: httpx2.get(f"{server}/v1/videos/{video_id}").json()["status"] == "completed")
    assert engine.cancelled == []
    assert httpx2.get(f"{server}/v1/videos/{video_id}/content").content == b"INIT[slow:0]"


def test_client_that_leaves_while_sending(server: str, engine: Any) -> None:
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"POST {URL} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n".encode())
        connection.sendall(b"content-length: 100\r\n\r\n{")
    assert httpx2.get(f"{server}/health").status_code == 200
    assert engine.requests == []


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
)
_KNOWN = st.sampled_from(
    sorted(set(FIELD_ALIASES) | set(HELIOS_ALIASES) | set(HELIOS_CONTAINERS))
    + sorted({field.alias or name for name, field in GenerationBody.model_fields.items()})
    + sorted(HeliosParams.model_fields)
)
_NESTED = st.sampled_from(
    sorted({*PromptEntry.model_fields, *VideoReference.model_fields, "image_url", "steps", "seconds", "crf"})
)
_VALUES = _JSON | st.dictionaries(_NESTED, _JSON, max_size=3) | st.lists(st.dictionaries(_NESTED, _JSON, max_size=3))
_BODIES = _JSON | st.dictionaries(_KNOWN, _VALUES, max_size=6) | st.dictionaries(_KNOWN, _SCALARS, max_size=6)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=_BODIES, with_prompt=st.booleans())
def test_no_json_makes_a_server_error(fuzz_client: TestClient, body: Any, with_prompt: bool) -> None:
    if with_prompt and isinstance(body, dict):
        body = {"prompt": "p"} | body
    answer = fuzz_client.post(URL, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
