"""SIGTERM to a real server under load: it is gone within 10 s, nothing has failed, and its successor goes on.

Wall clocks: a server whose clock is an hour off, and steps, works as any other.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.faults.conftest import NewServer
from tests.faults.raw_http import Answer, exchange, json_request, read_answer, request, slow_socket
from tests.faults.server_process import Server
from tests.faults.test_hostile import new_key, with_key

pytestmark = pytest.mark.server

NUM_JOBS = 20
EXIT_S = 10.0
LONG = {"prompt": "long", "num_frames": 3300, "size": "64x64"}


def body(index: int) -> dict[str, object]:
    options = {"reproducible": "strict"}
    return {"prompt": f"video {index}", "seed": index, "num_frames": 165, "size": "64x64", "helios": options}


def create(server: Server, fields: dict[str, object]) -> str:
    content = server.call("POST", "/v1/videos", fields)
    assert content is not None
    return str(json.loads(content)["id"])


def finished(server: Server, video_ids: list[str], timeout_s: float = 120.0) -> list[bytes]:
    """The videos, when all are completed."""
    deadline = time.monotonic() + timeout_s
    videos = []
    for video_id in video_ids:
        while (job := server.get(f"/v1/videos/{video_id}"))["status"] in ("queued", "in_progress"):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        assert job["status"] == "completed", job["error"]
        content = server.call("GET", f"/v1/videos/{video_id}/content")
        assert content is not None
        videos.append(content)
    return videos


def ended(server: Server) -> tuple[int, float]:
    """Exit status, and the seconds since this call."""
    assert server.process is not None
    started = time.monotonic()
    status = server.process.wait(timeout=3 * EXIT_S)
    return status, time.monotonic() - started


def test_sigterm_under_load(new_server: NewServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Matrix row 27."""
    server = new_server()
    server.start()
    undisturbed = finished(server, [create(server, body(index)) for index in range(NUM_JOBS)])
    jobs = [create(server, body(index)) for index in range(NUM_JOBS)]
    while server.get(f"/v1/videos/{jobs[0]}")["status"] == "queued":
        time.sleep(0.02)
    with ThreadPoolExecutor(4) as clients:
        port = server.port
        sync = clients.submit(exchange, port, json_request("POST", "/v1/videos/generations", LONG))
        events = clients.submit(exchange, port, request("GET", f"/v1/videos/{jobs[-1]}/events"))
        streamed = clients.submit(sse_of, port)
        session = clients.submit(session_close_code, port)
        time.sleep(0.7)
        server.signal(signal.SIGTERM)
        status, exit_s = ended(server)
        answers = (sync.result(), events.result(), streamed.result())
        close_code = session.result()
    assert (status, exit_s <= EXIT_S) == (0, True), exit_s
    assert_drained(*answers)
    assert close_code == 1012
    assert "Traceback" not in (server.data_dir / "server.log").read_text()
    server.start()
    started = time.monotonic()
    states = [server.get(f"/v1/videos/{job}")["status"] for job in jobs]
    assert "failed" not in states
    assert "queued" in states or "in_progress" in states, "the signal came too late to disturb anything"
    assert finished(server, jobs) == undisturbed
    with capsys.disabled():
        print(f"\n  exit after {exit_s:.2f} s, all done {time.monotonic() - started:.1f} s after the start", end=" ")


def sse_of(port: int) -> Answer | None:
    """The events of a call that makes its own job."""
    return exchange(port, json_request("POST", "/v1/videos/generations", {**LONG, "stream": True}))


def session_close_code(port: int) -> int:
    """The code that a session is closed with."""

    async def run() -> int:
        async with connect(f"ws://127.0.0.1:{port}/v1/realtime/video", proxy=None) as socket:
            start = {"type": "session.start", "prompt": "live", "size": "64x64", "protocol": "helios.v1"}
            await socket.send(json.dumps(start))
            try:
                while True:
                    await socket.recv()
            except ConnectionClosed as error:
                return -1 if error.rcvd is None else error.rcvd.code

    return asyncio.run(run())


def assert_drained(sync: Answer | None, *streams: Answer | None) -> None:
    assert sync is not None
    assert (sync.status, sync.code, sync.headers["retry-after"]) == (503, "draining", "1")
    for stream in streams:
        assert stream is not None  # the end of the body came, not the end of the connection
        assert stream.body.endswith(b"retry: 500\n\n")
        assert b"event: error" not in stream.body


def test_a_stream_that_nobody_reads_does_not_hold_the_exit_up(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    fields = {**LONG, "stream": True, "helios": {"crf": 1}}
    with closing(slow_socket(server.port, json_request("POST", "/v1/videos/generations", fields))):
        time.sleep(3.0)  # more than its buffers hold is made
        server.signal(signal.SIGTERM)
        assert server.process is not None
        try:
            assert server.process.wait(EXIT_S + 1) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"it still runs after {EXIT_S} s")


def test_a_second_signal_ends_at_once(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    job = create(server, LONG)
    with ThreadPoolExecutor(1) as clients:
        clients.submit(exchange, server.port, json_request("POST", "/v1/videos/generations", LONG))
        time.sleep(0.5)
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)
        _, exit_s = ended(server)
    assert exit_s <= 5.0
    server.start()
    assert server.get(f"/v1/videos/{job}")["status"] in ("queued", "in_progress")


def test_new_calls_are_refused_while_it_drains(new_server: NewServer) -> None:
    """What comes over a connection that is open already is told to go elsewhere."""
    server = new_server()
    server.start()
    create(server, {**LONG, "size": "256x256"})  # its steps take long enough to look in meanwhile
    client = slow_socket(server.port, request("GET", "/ready"), receive_bytes=65536)
    assert read_answer(client) is not None
    time.sleep(1.0)
    server.signal(signal.SIGTERM)
    time.sleep(0.05)
    try:
        client.sendall(json_request("POST", "/v1/videos", LONG))
        answer = read_answer(client, "POST")
    except (BrokenPipeError, ConnectionResetError):
        answer = None  # idle connections are closed at once
    client.close()
    assert answer is None or (answer.status, answer.code) == (503, "draining")
    assert ended(server)[0] == 0


# Clocks.


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long shift(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_SHIFT"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += shift();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec; now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The wall clock of servers that are started in `used`: `seconds` off, from the moment that it is set."""

    library: Path
    shift: Path

    @contextmanager
    def used(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(self.library))
            patch.setenv("CLOCK_SHIFT", str(self.shift))
            yield

    def set(self, seconds: int) -> None:
        part = self.shift.with_suffix(".part")
        part.write_text(str(seconds))
        part.replace(self.shift)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the library that shifts the clock")
    (tmp_path / "clock.c").write_text(CLOCK)
    made = Clock(library=tmp_path / "clock.so", shift=tmp_path / "shift")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made.library, tmp_path / "clock.c", "-ldl"], check=True)
    made.set(0)
    return made


def test_a_wall_clock_that_steps(new_server: NewServer, clock: Clock) -> None:
    """Matrix row 28: an hour forward, then two back, under jobs: all are done, at the usual pace, with their bytes."""
    server = new_server()
    with clock.used():
        server.start()
    started = time.monotonic()
    undisturbed = finished(server, [create(server, body(index)) for index in range(4)])
    usual_s = time.monotonic() - started
    for seconds in (3600, -3600):
        started = time.monotonic()
        jobs = [create(server, body(index)) for index in range(4)]
        clock.set(seconds)
        assert finished(server, jobs) == undisturbed
        assert time.monotonic() - started < 3 * usual_s + 5
        late = create(server, body(0))
        made_at = float(str(server.get(f"/v1/videos/{late}")["created_at"]))
        assert abs(made_at - time.time() - seconds) < 30, "the clock was not shifted"
    assert server.get("/ready") == {"status": "ok"}


def test_a_step_of_the_clock_is_no_waiting(new_server: NewServer, clock: Clock, tmp_path: Path) -> None:
    """Matrix row 28, time-outs: a job that waits for its turn has not waited an hour because the clock says so."""
    key = new_key(tmp_path / "keys.yaml", "one", "max_running_jobs=1")
    server = new_server("data", "--keys-file", str(tmp_path / "keys.yaml"))
    server.call = with_key(server, key)  # type: ignore[method-assign]
    with clock.used():
        server.start()
    first = create(server, {**body(0), "num_frames": 330})
    waiting = create(server, {**body(1), "num_frames": 33, "queue_timeout": 600})
    clock.set(3600)
    finished(server, [first, waiting])
