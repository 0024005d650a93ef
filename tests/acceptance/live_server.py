"""`helios-serve serve` as a user starts it, keys as `helios-serve keys` makes them, and plain HTTP to ask it with.

Knows the command line and JSON; knows no client library and no answer that would be right.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from typer.testing import CliRunner

from helios_serve.api.keys_cli import keys_app

PROGRAM = str(Path(sys.executable).parent / "helios-serve")
START_S = 120.0
ANSWER_S = 120.0
TINY: Mapping[str, object] = {"prompt": "a red ball rolls over green grass", "num_frames": 33, "size": "64x64"}
"""The smallest video: one chunk."""
LONG: Mapping[str, object] = {**TINY, "num_frames": 6600}
"""A video of 200 chunks, which takes longer than any test waits."""


@dataclass(kw_only=True)
class LiveServer:
    """A running server. `key` is sent as bearer token, unless it is empty."""

    url: str
    data_dir: Path
    key: str = ""
    http: httpx2.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=ANSWER_S, trust_env=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def as_key(self, key: str) -> LiveServer:
        """The same server, called with another key."""
        return LiveServer(url=self.url, data_dir=self.data_dir, key=key)

    def create(self, body: Mapping[str, object], **headers: str) -> str:
        """The id of a new job."""
        answer = self.http.post("/v1/videos", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def job(self, video_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/videos/{video_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def ended(self, video_id: str) -> dict[str, Any]:
        """The job when it has ended."""
        return self.until(video_id, lambda job: job["status"] in ("completed", "failed"))

    def until(self, video_id: str, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while not is_reached(job := self.job(video_id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job

    def cancel(self, video_id: str) -> None:
        answer = self.http.post(f"/v1/videos/{video_id}/cancel")
        assert answer.status_code == 200, answer.text


@contextmanager
def serving(data_dir: Path, *options: str) -> Iterator[LiveServer]:
    """Starts a server on a free port, waits until it is ready, and ends it with SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data_dir.mkdir(exist_ok=True)
    command = [PROGRAM, "serve", "--data-dir", str(data_dir), "--port", str(port), "--warmup", "none", *options]
    with (data_dir / "server.log").open("wb") as log:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HELIOS_")}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    server = LiveServer(url=f"http://127.0.0.1:{port}", data_dir=data_dir)
    try:
        _wait_ready(server, process)
        yield server
    finally:
        server.http.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_key(keys_file: Path, *options: str) -> str:
    """A key as `helios-serve keys create` prints it, once; run here, as a process takes seconds to import torch."""
    result = CliRunner().invoke(keys_app, ["create", "--keys-file", str(keys_file), *options])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error of an answer, in the one shape that every error has."""
    body = json.loads(answer.text)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    found: dict[str, Any] = body["error"]
    return found


def _wait_ready(server: LiveServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, (server.data_dir / "server.log").read_text()[-2000:]
        assert time.monotonic() < deadline, "the server does not become ready"
        try:
            if server.http.get("/ready").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
