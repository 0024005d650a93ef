"""kill -9 of the whole server, again and again, under concurrent jobs: nothing that was accepted is lost or made twice,
and every video has the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
from collections import defaultdict

from tests.faults.conftest import NewServer
from tests.faults.server_process import Server

NUM_JOBS = 8
NUM_KILLS = int(os.environ.get("HELIOS_TEST_KILLS", "4"))
"""50 by hand; a few with every commit, as each costs a start of the server."""


def body(index: int) -> dict[str, object]:
    """Jobs of different lengths and seeds, never packed with others so that their bytes are exact."""
    return {
        "prompt": f"video {index}",
        "seed": index,
        "num_frames": 33 * (2 + index % 3),
        "helios": {"reproducible": "strict"},
    }


def finished(server: Server, video_ids: list[str]) -> list[bytes]:
    """The videos, when all are completed."""
    deadline = time.monotonic() + 120
    for video_id in video_ids:
        while (job := server.get(f"/v1/videos/{video_id}"))["status"] in ("queued", "in_progress"):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        assert job["status"] == "completed", job
    videos = []
    for video_id in video_ids:
        content = server.call("GET", f"/v1/videos/{video_id}/content")
        assert content is not None
        videos.append(content)
    return videos


def create(server: Server, index: int) -> str:
    """Creates until it is accepted: a call that was cut may have been accepted too, and that is found by its key."""
    content = server.call("POST", "/v1/videos", body(index))
    assert content is not None
    return str(json.loads(content)["id"])


def test_killed_again_and_again(new_server: NewServer) -> None:
    server = new_server()
    rng = random.Random(7)
    server.start()
    undisturbed = finished(server, [create(server, index) for index in range(NUM_JOBS)])
    accepted = [create(server, index) for index in range(NUM_JOBS)]
    seen: defaultdict[str, dict[int, str]] = defaultdict(dict)
    epochs: dict[str, int] = {}
    num_mid_job = 0
    for number in range(NUM_KILLS):
        time.sleep(rng.uniform(0.0, 1.2))
        num_mid_job += sum(
            server.get(f"/v1/videos/{video_id}")["status"] in ("queued", "in_progress") for video_id in accepted
        )
        server.kill()
        check_history(server, seen, epochs)
        server.start()
        if number % 3 == 2:  # new work for those that have ended
            accepted += [create(server, index) for index in range(NUM_JOBS)]
    assert num_mid_job >= NUM_KILLS, "the kills found nothing to disturb"
    videos = finished(server, accepted)
    for position, video in enumerate(videos):
        assert video == undisturbed[position % NUM_JOBS], f"job {position} has other bytes"
    check_history(server, seen, epochs)


def check_history(server: Server, seen: defaultdict[str, dict[int, str]], epochs: dict[str, int]) -> None:
    """Chunks have no gap, a published one keeps its bytes, and epochs only grow."""
    with sqlite3.connect(f"file:{server.data_dir / 'helios.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT job, idx, seg_blob FROM chunk ORDER BY job, idx").fetchall()
        jobs = database.execute("SELECT id, epoch, next_chunk FROM job").fetchall()
    by_job: defaultdict[str, list[int]] = defaultdict(list)
    for job, idx, segment in rows:
        by_job[job].append(idx)
        if segment is not None:
            assert seen[job].setdefault(idx, segment) == segment, f"chunk {idx} of {job} changed"
    for job, epoch, next_chunk in jobs:
        assert by_job[job] == list(range(next_chunk)), f"chunks of {job}: {by_job[job]}, next is {next_chunk}"
        assert epoch >= epochs.get(job, 0)
        epochs[job] = epoch
