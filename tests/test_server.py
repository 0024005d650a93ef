"""The server as a user starts it: the printed command, several clients, bad requests, and both signals."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx2
import pytest

PROGRAM = Path(sys.executable).with_name("helios-serve")
START_S = 90
STOP_S = 10


@dataclass
class Server:
    """A running process and what it printed."""

    process: subprocess.Popen[str]
    url: str = ""
    curl: str = ""
    errors: list[str] = field(default_factory=list)

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal and waits; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=STOP_S)


@contextmanager
def serving(data_dir: Path, *arguments: str) -> Iterator[Server]:
    command = [str(PROGRAM), "serve", *arguments, "--port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        server = Server(process=process)
        reader = threading.Thread(target=lambda: server.errors.extend(process.stderr))
        reader.start()
        try:
            server.url, server.curl = _read_welcome(process)
            watchdog.cancel()
            yield server
        finally:
            watchdog.cancel()
            process.kill()
            reader.join()
            print("".join(server.errors)[-4000:])  # shown when a test fails


def _read_welcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    text = ""
    assert process.stdout is not None
    for line in process.stdout:
        text += line
        if "Stop with Ctrl-C" in line:
            break
    address = re.search(r"at (http://127\.0\.0\.1:\d+)$", text, re.MULTILINE)
    command = re.search(r"curl .*?-o video\.mp4", text, re.DOTALL)
    assert address is not None, text
    assert command is not None, text
    return address[1], command[0]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the embedded checkpoint is made once."""
    return tmp_path_factory.mktemp("data")


def num_frames(video: bytes) -> int:
    with av.open(io.BytesIO(video), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def make(server: Server, **body: object) -> httpx2.Response:
    return httpx2.post(
        f"{server.url}/v1/videos/generations",
        json={"prompt": "a fox", "num_frames": 33, "size": "128x64", **body},
        headers={"accept": "video/mp4"},
        timeout=60,
    )


def test_a_server_from_start_to_ctrl_c(data_dir: Path, tmp_path: Path) -> None:
    with serving(data_dir) as server:
        assert (data_dir / "models" / "helios-tiny" / "model_index.json").is_file()
        assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
        assert httpx2.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "helios-tiny"

        words = shlex.split(server.curl.replace("\\\n", " "))
        assert (words[:2], words[-2:]) == (["curl", f"{server.url}/v1/videos/generations"], ["-o", "video.mp4"])
        started = time.monotonic()
        subprocess.run(["bash", "-c", server.curl], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert time.monotonic() - started < 15
        assert num_frames((tmp_path / "video.mp4").read_bytes()) == 33

        wanted = (33, 1, 40, 66)
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda count: make(server, num_frames=count, seed=count), wanted))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert [num_frames(answer.content) for answer in answers] == list(wanted)

        bad = make(server, size="130x64")
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "size")
        good = make(server)
        assert (good.status_code, good.headers["content-type"]) == (200, "video/mp4")

        live = make(server, num_frames=70, stream=True)
        assert live.headers["x-video-id"].startswith("video_")
        assert num_frames(live.content) == 70
        stored = httpx2.get(f"{server.url}/v1/videos/{live.headers['x-video-id']}/content")
        assert num_frames(stored.content) == 70
        poster = httpx2.get(stored.url, params={"variant": "thumbnail"})
        assert poster.content[8:12] == b"WEBP"

        assert server.stop(signal.SIGINT) == 0
    assert "Traceback" not in "".join(server.errors)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_busy_server_and_the_next_one_goes_on(data_dir: Path, number: signal.Signals) -> None:
    """The running request is answered with 503 `draining`; its job loses nothing."""
    with serving(data_dir) as server, ThreadPoolExecutor(1) as clients:
        running = clients.submit(make, server, num_frames=1320, prompt=f"signal {number}")
        video = until(server, lambda newest: newest["prompt"] == f"signal {number}" and chunks_done(newest) >= 1)
        assert not running.done()
        assert server.stop(number) == 0
        answer = running.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["retry-after"] == "1"
    assert "Traceback" not in "".join(server.errors)
    with serving(data_dir) as server:
        found = newest(server)
        assert (found["id"], found["status"]) == (video["id"], "in_progress")
        assert chunks_done(found) >= chunks_done(video)
        until(server, lambda newest: newest["status"] == "completed")
        content = httpx2.get(f"{server.url}/v1/videos/{video['id']}/content")
        assert num_frames(content.content) == 1320
        assert server.stop(number) == 0
    assert "Traceback" not in "".join(server.errors)


def newest(server: Server) -> dict[str, Any]:
    found: list[dict[str, Any]] = httpx2.get(f"{server.url}/v1/videos", params={"limit": 1}).json()["data"]
    return found[0] if found else {"prompt": "", "status": "", "helios": {"chunks_done": 0}}


def chunks_done(video: dict[str, Any]) -> int:
    count: int = video["helios"]["chunks_done"]
    return count


def until(server: Server, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The newest job, when it is so."""
    deadline = time.monotonic() + 120
    while not condition(video := newest(server)):
        assert time.monotonic() < deadline, video
        time.sleep(0.05)
    return video


def test_the_greeting_means_that_it_listens(data_dir: Path) -> None:
    with serving(data_dir, "--warmup", "none") as server:
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))).close()
        assert server.stop(signal.SIGTERM) == 0


def test_a_taken_port_is_one_clear_error(data_dir: Path) -> None:
    with socket_on_free_port() as port:
        done = subprocess.run(
            [str(PROGRAM), "serve", "--port", str(port), "--data-dir", str(data_dir)],
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.fullmatch(rf"error: cannot listen on 127\.0\.0\.1:{port}: .*; choose another --port", line)


@contextmanager
def socket_on_free_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
