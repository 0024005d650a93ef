"""Clients that leave: their job is cancelled within a step, unless it was detached or somebody else waits for it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import pytest

from tests.acceptance.live_server import LONG, LiveServer

pytestmark = pytest.mark.server

GENERATIONS = "/v1/videos/generations"
CANCELLED_S = 5.0
"""A step of the tiny checkpoint takes milliseconds; a machine that others use as well may take longer to run it."""

ANSWERS: dict[str, tuple[dict[str, object], str]] = {
    "sync": ({}, "application/json"),
    "sync mp4": ({}, "video/mp4"),
    "sse": ({"stream": True}, "*/*"),
    "chunked": ({"stream": True}, "video/mp4"),
}


@pytest.fixture
def prompt(server: LiveServer) -> Iterator[str]:
    """One that no other job has; its jobs are cancelled at the end."""
    name = f"a ball rolls {uuid4()}"
    yield name
    for job in jobs(server, name):
        server.cancel(job["id"])


def jobs(server: LiveServer, prompt: str) -> list[dict[str, Any]]:
    return [job for job in server.http.get("/v1/videos?limit=100").json()["data"] if job["prompt"] == prompt]


def connect(server: LiveServer, body: dict[str, object], accept: str, key: str | None = None) -> socket.socket:
    """A connection on which the request was sent."""
    data = json.dumps(body)
    more = "" if key is None else f"Idempotency-Key: {key}\r\n"
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), 60)
    client.sendall(f"{head}{more}Content-Length: {len(data)}\r\n\r\n{data}".encode())
    return client


def running(server: LiveServer, prompt: str) -> str:
    """The id of the only job with this prompt, when its second chunk is being made."""
    deadline = time.monotonic() + 60
    while not (found := jobs(server, prompt)) or found[0]["helios"]["chunks_done"] < 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    (only,) = found
    return str(only["id"])


def work(job: dict[str, Any]) -> tuple[Any, ...]:
    """What a step changes."""
    return job["progress"], job["helios"]["chunks_done"], job["helios"]["usage"]["gpu_seconds"]


def assert_stopped(server: LiveServer, video_id: str, left_at: float) -> None:
    job = server.until(video_id, lambda job: job["helios"]["state"] not in ("queued", "in_progress"))
    assert time.monotonic() - left_at < CANCELLED_S
    assert (job["helios"]["state"], job["status"], job["error"]["code"]) == ("cancelled", "failed", "cancelled")
    steps = num_steps(server)
    time.sleep(0.7)
    assert work(server.job(video_id)) == work(job)
    assert num_steps(server) <= steps + 1, "the device still works"  # one was under way


def num_steps(server: LiveServer) -> float:
    """Steps that the server has run, for anyone."""
    lines = server.http.get("/metrics").text.splitlines()
    counts = [line.rpartition(" ")[2] for line in lines if line.startswith("helios:denoise_step_seconds_count")]
    assert counts, "no such metric"
    return sum(float(count) for count in counts)


def goes_on(server: LiveServer, video_id: str) -> bool:
    done = server.job(video_id)["helios"]["chunks_done"]
    deadline = time.monotonic() + 30
    while (job := server.job(video_id))["helios"]["chunks_done"] <= done + 2:
        if job["status"] != "in_progress" or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_client_that_leaves_cancels(server: LiveServer, prompt: str, answer: str) -> None:
    fields, accept = ANSWERS[answer]
    with closing(connect(server, {**LONG, **fields, "prompt": prompt}, accept)):
        video_id = running(server, prompt)
    assert_stopped(server, video_id, time.monotonic())


@pytest.mark.parametrize("answer", ANSWERS)
def test_detached_goes_on(server: LiveServer, prompt: str, answer: str) -> None:
    fields, accept = ANSWERS[answer]
    with closing(connect(server, {**LONG, **fields, "prompt": prompt, "detach": True}, accept)):
        video_id = running(server, prompt)
    assert goes_on(server, video_id)


def test_a_client_that_leaves_while_its_job_waits_cancels(server: LiveServer, prompt: str) -> None:
    with closing(connect(server, {**LONG, "prompt": prompt}, "application/json")):
        deadline = time.monotonic() + 30
        while not (found := jobs(server, prompt)):
            assert time.monotonic() < deadline
    assert_stopped(server, found[0]["id"], time.monotonic())


@pytest.mark.parametrize("path", ["events", "stream"])
def test_a_watcher_that_leaves_changes_nothing(server: LiveServer, prompt: str, path: str) -> None:
    video_id = server.create({**LONG, "prompt": prompt})
    with server.http.stream("GET", f"/v1/videos/{video_id}/{path}") as answer:
        assert next(answer.iter_bytes())
        running(server, prompt)
    assert goes_on(server, video_id)


@pytest.mark.parametrize("answer", ANSWERS)
def test_who_joined_and_leaves_changes_nothing(server: LiveServer, prompt: str, answer: str) -> None:
    """Under the same idempotency key two callers wait for one job; it ends with its own caller."""
    fields, accept = ANSWERS[answer]
    key, body = str(uuid4()), {**LONG, **fields, "prompt": prompt}
    with closing(connect(server, body, accept, key)):
        video_id = running(server, prompt)
        with closing(connect(server, body, accept, key)):
            time.sleep(0.5)
        assert goes_on(server, video_id)
    assert_stopped(server, video_id, time.monotonic())


def test_the_connection_ends_when_the_job_is_cancelled(server: LiveServer, prompt: str) -> None:
    """The other way round: a waiting client is told."""
    with closing(connect(server, {**LONG, "prompt": prompt}, "application/json")) as client:
        server.cancel(running(server, prompt))
        client.settimeout(CANCELLED_S)
        answer = b""
        while b'"code":"cancelled"' not in answer:  # head and body may come apart
            answer += (piece := client.recv(65536))
            assert piece, answer
    assert answer.startswith(b"HTTP/1.1 409")
