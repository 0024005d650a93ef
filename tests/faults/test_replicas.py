"""Two servers on one Postgres and one directory of blobs: any of them answers for any job, and one that was paused past
its leases changes nothing any more."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import NewServer
from tests.faults.server_process import Server

Replicas = tuple[Server, Server]


@pytest.fixture
def replicas(new_server: NewServer, postgres_url: str, tmp_path: Path) -> Replicas:
    options = ("--database-url", postgres_url, "--blob-url", f"file://{tmp_path}/blobs")
    first, second = new_server("first", *options), new_server("second", *options)
    first.start()
    second.start()
    return first, second


def create(server: Server, **fields: object) -> str:
    content = server.call("POST", "/v1/videos", {"prompt": "a harbour", "seed": 5, **fields})
    assert content is not None
    return str(json.loads(content)["id"])


def ended(server: Server, video_id: str, timeout_s: float = 120.0) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    while (job := server.get(f"/v1/videos/{video_id}"))["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


def video(server: Server, video_id: str) -> bytes:
    content = server.call("GET", f"/v1/videos/{video_id}/content")
    assert content is not None
    return content


def test_any_replica_answers(replicas: Replicas) -> None:
    first, second = replicas
    video_id = create(first, num_frames=132)
    streamed = second.call("GET", f"/v1/videos/{video_id}/stream")
    assert streamed is not None
    assert streamed[4:8] == b"ftyp"
    assert streamed.count(b"moof") == 4
    assert ended(second, video_id)["status"] == "completed"
    assert video(first, video_id) == video(second, video_id)
    listed = second.get("/v1/videos")["data"]
    assert isinstance(listed, list)
    assert [job["id"] for job in listed] == [video_id]


def test_cancelled_and_deleted_at_the_other(replicas: Replicas) -> None:
    first, second = replicas
    video_id = create(first, num_frames=3300)
    while first.get(f"/v1/videos/{video_id}")["status"] == "queued":
        time.sleep(0.05)
    assert second.call("POST", f"/v1/videos/{video_id}/cancel") is not None
    assert first.get(f"/v1/videos/{video_id}")["helios"]["state"] == "cancelled"  # type: ignore[index]
    # What ran for it has stopped: the next job has the server for itself, and is done in a moment.
    assert ended(first, create(first, num_frames=33), 30)["status"] == "completed"
    assert second.call("DELETE", f"/v1/videos/{video_id}") is not None
    with pytest.raises(AssertionError, match="not found"):
        first.get(f"/v1/videos/{video_id}")


def test_a_killed_replica_is_survived(replicas: Replicas) -> None:
    first, second = replicas
    strict = {"num_frames": 264, "helios": {"reproducible": "strict"}}
    undisturbed = create(second, **strict)
    assert ended(second, undisturbed)["status"] == "completed"
    video_id = create(first, **strict)
    while first.get(f"/v1/videos/{video_id}")["helios"]["chunks_done"] < 2:  # type: ignore[index]
        time.sleep(0.02)
    first.kill()
    job = ended(second, video_id)
    assert job["status"] == "completed"
    assert video(second, video_id) == video(second, undisturbed)


def test_a_paused_replica_is_fenced(replicas: Replicas) -> None:
    """SIGSTOP for longer than a lease: the other one finishes the job, and what the first then commits is refused."""
    first, second = replicas
    strict = {"num_frames": 264, "helios": {"reproducible": "strict"}}
    undisturbed = create(second, **strict)
    assert ended(second, undisturbed)["status"] == "completed"
    video_id = create(first, **strict)
    while first.get(f"/v1/videos/{video_id}")["helios"]["chunks_done"] < 2:  # type: ignore[index]
        time.sleep(0.02)
    first.signal(signal.SIGSTOP)
    try:
        job = ended(second, video_id)
    finally:
        first.signal(signal.SIGCONT)
    assert job["status"] == "completed"
    finished = video(second, video_id)
    assert finished == video(second, undisturbed)
    time.sleep(1.0)  # the first wakes up in the middle of a chunk that is no longer its to make
    assert ended(first, video_id)["status"] == "completed"
    assert video(first, video_id) == finished
    assert ended(first, create(first, num_frames=33), 30)["status"] == "completed", "it serves on"
