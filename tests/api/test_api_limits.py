"""What a key's limits do to the routes that create, and what their answers tell of the frames that are left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from helios_serve.api.keys import KeyLimits, new_key
from helios_serve.types import VideoRequest
from tests.api.conftest import FakeEngine, Parts, client_of
from tests.api.desks import app_over
from tests.api.test_api_streaming import finished

VIDEOS = "/v1/videos"
URL = "/v1/videos/generations"
SMALL = {"prompt": "p", "num_frames": 33}


@contextmanager
def with_key(parts: Parts, limits: KeyLimits) -> Iterator[TestClient]:
    """A client whose key has these limits."""
    plain, key = new_key(limits=limits)
    with client_of(app_over(parts, [key])) as client:
        client.headers["authorization"] = f"Bearer {plain}"
        yield client


def left(answer: Any) -> tuple[int, int]:
    """The limit and what is left of it, as the answer tells."""
    assert 0 <= int(answer.headers["x-ratelimit-reset-frames"]) <= 60
    return int(answer.headers["x-ratelimit-limit-frames"]), int(answer.headers["x-ratelimit-remaining-frames"])


def test_every_route_that_creates_tells_what_is_left(parts: Parts) -> None:
    with with_key(parts, KeyLimits(frames_per_minute=100_000)) as client:
        made = client.post(VIDEOS, json=SMALL)
        video_id = made.json()["id"]
        assert finished(client, video_id)["status"] == "completed"
        assert left(made)[0] == 100_000
        extension = {"prompt": "q", "video": {"id": video_id}, "num_frames": 33}
        for path, body, headers, status in (
            (URL, SMALL, {}, 200),
            (URL, SMALL, {"accept": "video/mp4"}, 200),
            (URL, SMALL, {"prefer": "respond-async"}, 202),
            (URL, {**SMALL, "stream": True}, {}, 200),
            (f"{VIDEOS}/sync", SMALL, {}, 200),
            (f"{VIDEOS}/{video_id}/remix", {"prompt": "q"}, {}, 200),
            (f"{VIDEOS}/extensions", extension, {}, 200),
        ):
            answer = client.post(path, json=body, headers=headers)
            assert answer.status_code == status, answer.text
            assert left(answer)[0] == 100_000
            assert left(answer)[1] < 100_000, "33 frames are taken; a minute gives all of them back"


def test_a_job_that_was_there_costs_nothing_and_tells_what_is_left(parts: Parts) -> None:
    with with_key(parts, KeyLimits(frames_per_minute=60)) as client:
        headers = {"idempotency-key": "k"}
        first = client.post(VIDEOS, json=SMALL, headers=headers)
        again = client.post(VIDEOS, json=SMALL, headers=headers)
        assert again.headers["idempotent-replayed"] == "true"
        assert left(first)[1] <= left(again)[1] < 60
        refused = client.post(VIDEOS, json=SMALL)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert left(refused)[1] < 33


def test_without_keys_no_frames_are_counted(client: TestClient) -> None:
    assert not [name for name in client.post(VIDEOS, json=SMALL).headers if name.startswith("x-ratelimit")]


def test_an_extension_is_bounded_by_the_whole_result(parts: Parts) -> None:
    with with_key(parts, KeyLimits(max_frames_per_job=66)) as client:
        video_id = client.post(VIDEOS, json={**SMALL, "num_frames": 40}).json()["id"]
        assert finished(client, video_id)["status"] == "completed"
        body = {"prompt": "q", "video": {"id": video_id}}
        error = client.post(f"{VIDEOS}/extensions", json={**body, "num_frames": 27}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "num_frames")
        assert "num_frames 67: at most 66 for this key" in error["message"]
        fits = client.post(f"{VIDEOS}/extensions", json={**body, "num_frames": 26})
        assert (fits.status_code, fits.json()["helios"]["num_frames"]) == (200, 66)


# A client that says how long it waits.


def with_queue(parts: Parts, wait_s: float) -> list[VideoRequest]:
    """The engine says that nothing starts sooner; returns what it is asked about."""
    asked: list[VideoRequest] = []

    def start_in_s(request: VideoRequest) -> float:
        asked.append(request)
        return wait_s

    intake = parts.service._intake
    intake._config = replace(intake._config, start_in_s=start_in_s)
    return asked


def test_a_queue_that_outlasts_the_client_is_429(parts: Parts, client: TestClient, engine: FakeEngine) -> None:
    """132 frames at 12 a second take 11 s."""
    body, patience = {"prompt": "p", "num_frames": 132}, {"x-stainless-read-timeout": "20"}
    asked = with_queue(parts, 12.5)
    refused = client.post(URL, json=body, headers=patience)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "queue_wait_too_long", "rate_limit_error")
    assert refused.headers["retry-after"] == "4"  # 12.5 + 11 - 20, rounded up
    assert "x-should-retry" not in refused.headers
    assert "Prefer: respond-async" in error["message"]
    assert [request.params.num_frames for request in asked] == [132]
    assert engine.requests == []
    alone = client.post(URL, json=body, headers={"x-stainless-read-timeout": "10"})
    assert (alone.status_code, alone.json()["error"]["code"]) == (400, "sync_too_long")
    for headers, extra in (
        ({"x-stainless-read-timeout": "600"}, {}),
        ({}, {}),
        ({**patience, "prefer": "wait=5"}, {}),
        (patience, {"stream": True}),
    ):
        assert client.post(URL, json=body | extra, headers=headers).status_code == 200


def test_a_repeated_call_joins_its_job_however_long_the_queue(parts: Parts, client: TestClient) -> None:
    headers = {"x-stainless-read-timeout": "20", "idempotency-key": "k"}
    first = client.post(URL, json=SMALL, headers=headers).json()["id"]
    with_queue(parts, 1000)
    assert client.post(URL, json=SMALL, headers=headers).json()["id"] == first
    refused = client.post(URL, json={**SMALL, "prompt": "q"}, headers={"x-stainless-read-timeout": "20"})
    assert refused.headers["retry-after"] == "120"


@pytest.mark.parametrize("wait_s", [0.0, 5.0])
def test_a_queue_that_the_client_outlasts_is_no_reason(parts: Parts, client: TestClient, wait_s: float) -> None:
    with_queue(parts, wait_s)
    body = {"prompt": "p", "num_frames": 132}
    assert client.post(URL, json=body, headers={"x-stainless-read-timeout": "17"}).status_code == 200
