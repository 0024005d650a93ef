"""A disk that fills up, fails or loses bytes under a real server: nothing is acknowledged that is not kept, the server
stays, and goes on when the disk is well.

What the operating system cannot be made to do without privileges enters at the named points of `helios_serve.faults`.
"""

from __future__ import annotations

import errno
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.conftest import NewServer
from tests.faults.faulty_server import FaultyServer
from tests.faults.raw_http import Answer, exchange, json_request, request
from tests.faults.server_process import Server
from tests.faults.test_drain import body, create, finished

pytestmark = pytest.mark.server

WRITES = {"blob.write": errno.ENOSPC, "db.commit": errno.ENOSPC}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path) -> None:
    path.unlink()


@pytest.fixture
def faulty(new_server: NewServer) -> FaultyServer:
    plain = new_server()
    return FaultyServer(model=plain.model, data_dir=plain.data_dir, port=plain.port, options=plain.options)


@pytest.fixture(autouse=True)
def killed(faulty: FaultyServer) -> Iterator[None]:
    yield
    faulty.kill()


def attempt(server: Server, fields: dict[str, object]) -> Answer:
    answer = exchange(server.port, json_request("POST", "/v1/videos", fields))
    assert answer is not None
    return answer


def rows(server: Server, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(f"file:{server.data_dir / 'helios.db'}?mode=ro", uri=True) as database:
        return database.execute(query).fetchall()


def blob(server: Server, video_id: str, column: str, idx: int) -> Path:
    ((key,),) = rows(server, f"SELECT {column} FROM chunk WHERE job = '{video_id}' AND idx = {idx}")
    return server.data_dir / "blobs" / str(key)


def chunks_done(server: Server, video_id: str) -> int:
    helios = server.get(f"/v1/videos/{video_id}")["helios"]
    assert isinstance(helios, dict)
    return int(helios["chunks_done"])


def test_nothing_is_acknowledged_that_is_not_kept(faulty: FaultyServer) -> None:
    """Matrix rows 10 and 11: full, read-only and failing, while a job runs, which goes on when it is over."""
    faulty.start()
    (undisturbed,) = finished(faulty, [create(faulty, body(1))])
    accepted = 1
    for number, status, code in (
        (errno.ENOSPC, 507, "storage_full"),
        (errno.EROFS, 503, "storage_unavailable"),
        (errno.EIO, 503, "storage_unavailable"),
    ):
        running = create(faulty, body(1))
        accepted += 1
        with faulty.failing({"db.commit": number, "blob.write": number}):
            answers = [attempt(faulty, body(index)) for index in range(5)]
            assert {(answer.status, answer.code) for answer in answers} == {(status, code)}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
            assert faulty.get(f"/v1/videos/{running}")["status"] in ("queued", "in_progress"), "reading goes on"
            time.sleep(0.5)
        listed = faulty.get("/v1/videos?limit=100")["data"]
        assert isinstance(listed, list)
        assert len(listed) == accepted, "a job that was refused is there"
        assert finished(faulty, [running]) == [undisturbed]
    assert faulty.process is not None
    assert faulty.process.poll() is None


def test_a_server_that_cannot_write_is_not_ready(faulty: FaultyServer) -> None:
    """RELIABILITY.md 6, health: store writable."""
    faulty.start()
    with faulty.failing(WRITES):
        attempt(faulty, body(1))
        deadline = time.monotonic() + 5
        while (answer := exchange(faulty.port, request("GET", "/ready"))) is not None and answer.status == 200:
            assert time.monotonic() < deadline, "ready for 5 s with a full disk"
            time.sleep(0.5)


def test_a_disk_that_stays_full_fails_no_job(faulty: FaultyServer) -> None:
    """Only the blobs' disk: the job is neither failed nor forgotten, and is made when there is space."""
    faulty.start()
    (undisturbed,) = finished(faulty, [create(faulty, body(1))])
    running = create(faulty, body(1))
    with faulty.failing({"blob.write": errno.ENOSPC}):
        time.sleep(4.0)
        assert faulty.get(f"/v1/videos/{running}")["status"] in ("queued", "in_progress")
    assert finished(faulty, [running], timeout_s=60) == [undisturbed]


def test_a_failed_fsync_is_written_again(faulty: FaultyServer) -> None:
    """Matrix row 12: nothing is acknowledged while every sync fails, and nothing of it is lost or damaged after."""
    faulty.start()
    (undisturbed,) = finished(faulty, [create(faulty, body(1))])
    with faulty.failing({"blob.fsync": errno.EIO}):
        running = create(faulty, body(1))
        time.sleep(2.0)
        assert rows(faulty, f"SELECT count(*) FROM chunk WHERE job = '{running}'") == [(0,)]
    assert finished(faulty, [running]) == [undisturbed]
    assert not list((faulty.data_dir / "blobs").glob("??/*#*")), "unfinished files stayed"


def test_latents_that_nobody_has_seen_are_made_again(faulty: FaultyServer) -> None:
    """Matrix row 13, in all three ways at once: the jobs step back, and their videos are as ever."""
    faulty.start()
    undisturbed = finished(faulty, [create(faulty, body(index)) for index in range(3)])
    with faulty.failing({"db.commit": errno.ENOSPC}, {"verb": "commit_segment"}):
        hurt = [create(faulty, body(index)) for index in range(3)]
        deadline = time.monotonic() + 20
        while rows(faulty, "SELECT count(DISTINCT job) FROM chunk WHERE seg_blob IS NULL") != [(3,)]:
            assert time.monotonic() < deadline, "not every job has a chunk without a segment"
            time.sleep(0.05)
        faulty.kill()
    for job, damage in zip(hurt, (flip, truncate, delete), strict=True):
        damage(blob(faulty, job, "lat_blob", 0))
    faulty.start()
    assert finished(faulty, hurt) == undisturbed
    assert (faulty.data_dir / "server.log").read_text().count("goes back to chunk 0") == 3


def test_latents_of_shown_segments_cost_that_job_alone(faulty: FaultyServer) -> None:
    faulty.start()
    undisturbed = finished(faulty, [create(faulty, body(1)), create(faulty, body(2))])
    hurt, other = create(faulty, {**body(1), "num_frames": 660}), create(faulty, body(2))
    while chunks_done(faulty, hurt) < 2:
        time.sleep(0.02)
    faulty.kill()
    ((shown,),) = rows(faulty, f"SELECT max(idx) FROM chunk WHERE job = '{hurt}' AND seg_blob IS NOT NULL")
    assert isinstance(shown, int)
    flip(blob(faulty, hurt, "lat_blob", shown))
    faulty.start()
    assert finished(faulty, [other]) == [undisturbed[1]]
    deadline = time.monotonic() + 60
    while (job := faulty.get(f"/v1/videos/{hurt}"))["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    error = job["error"]
    assert isinstance(error, dict)
    assert error["code"] == "data_loss"
    assert finished(faulty, [create(faulty, body(1))]) == [undisturbed[0]]


def test_segments_damaged_at_rest(faulty: FaultyServer) -> None:
    """No damaged byte is shown as good: the stream is cut or refused, with `data_loss` where there is an answer."""
    faulty.start()
    made = [create(faulty, body(index)) for index in range(4)]
    kept = finished(faulty, made)
    for video_id, damage in zip(made, (flip, truncate, delete), strict=False):
        assert exchange(faulty.port, request("GET", f"/v1/videos/{video_id}/stream")) is not None
        damage(blob(faulty, video_id, "seg_blob", 1))
        shown = exchange(faulty.port, request("GET", f"/v1/videos/{video_id}/stream"))
        assert shown is None or shown.status == 500
        segment = exchange(faulty.port, request("GET", f"/v1/videos/{video_id}/hls/seg1.m4s"))
        assert segment is not None
        assert (segment.status, segment.code) == (500, "data_loss")
    assert finished(faulty, made[3:]) == kept[3:]
    assert faulty.get("/ready") == {"status": "ok"}


def test_a_damaged_database_is_told_at_the_start(faulty: FaultyServer) -> None:
    """Matrix row 13, a page: `integrity_check` finds it, and the server says so instead of serving."""
    faulty.start()
    finished(faulty, [create(faulty, body(1))])
    faulty.kill()
    path = faulty.data_dir / "helios.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ((root,),) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'chunk'").fetchall()
        ((size,),) = database.execute("PRAGMA page_size").fetchall()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xa5" * size)
    with pytest.raises(AssertionError, match="is damaged"):
        faulty.start()
    assert faulty.process is not None
    assert faulty.process.wait() == 2


def fill(path: Path) -> None:
    """Writes until there is no space."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_file_system(new_server: NewServer) -> None:
    """Matrix row 10 with a real one, where this process may mount it: 24 MB of memory."""
    server = new_server("full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(server.data_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this process may not mount a tmpfs")
    try:
        server.start()
        kept = create(server, body(1))
        finished(server, [kept])
        ballast = server.data_dir / "ballast"
        fill(ballast)
        answers = [attempt(server, body(index)) for index in range(3)]
        assert {answer.status for answer in answers} <= {200, 507, 503}
        assert server.process is not None
        assert server.process.poll() is None
        ballast.unlink()
        accepted = [str(answer.json["id"]) for answer in answers if answer.status == 200]
        finished(server, [kept, *accepted, create(server, body(3))])
    finally:
        server.kill()
        subprocess.run(["umount", "-l", str(server.data_dir)], check=True)
