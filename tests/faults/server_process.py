"""`helios-serve serve` as a process that tests start, kill and ask."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

START_S = 60.0


def plain_environment() -> dict[str, str]:
    """Without what the tests are told by variables: the server refuses settings that it does not know."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HELIOS_")}


@dataclass
class Server:
    """`helios-serve serve` as a process of its own, on one data directory through all its lives."""

    model: Path
    data_dir: Path
    port: int
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ("--data-dir", str(self.data_dir), "--port", str(self.port), "--warmup", "none", *self.options)
        log = (self.data_dir / "server.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helios_serve.cli", "serve", str(self.model), *options],
            stdout=log,
            stderr=log,
            env=plain_environment(),
        )
        log.close()
        deadline = time.monotonic() + START_S
        while self.call("GET", "/ready") is None:
            assert self.process.poll() is None, (self.data_dir / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def call(self, method: str, path: str, body: object = None) -> bytes | None:
        """The body of a 2xx answer; None while nobody answers, or the server is not ready."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {} if data is None else {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            return None
        finally:
            connection.close()
        if answer.status == 503:
            return None
        assert 200 <= answer.status < 300, content
        return content

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def get(self, path: str) -> dict[str, object]:
        content = self.call("GET", path)
        assert content is not None
        answer: dict[str, object] = json.loads(content)
        return answer
