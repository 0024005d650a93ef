"""`helios-serve serve` with faults of its disk and database that a test switches on and off while it runs.

The server is the shipped one; only its stores are opened with a `FaultPlan` that reads a file. Run as a program.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helios_serve import cli, server
from helios_serve.faults import FaultPlan
from helios_serve.store.connect import StoreConfig, Stores, open_stores
from tests.faults.server_process import START_S, Server, plain_environment

SWITCH = "faults.json"
"""In the data directory: {"points": {point: errno}, "where": {fact: value}}; without it nothing fails."""


class SwitchedFaults(FaultPlan):
    """Raises OSError at the points that the switch names, for as long as it names them."""

    def __init__(self, switch: Path) -> None:
        super().__init__()
        self._switch = switch

    def at(self, point: str, **facts: object) -> bool:
        try:
            asked = json.loads(self._switch.read_text())
        except FileNotFoundError:
            return False
        number = asked["points"].get(point)
        if number is not None and all(facts.get(key) == value for key, value in asked["where"].items()):
            raise OSError(number, f"injected {errno.errorcode[number]} at {point}")
        return False


@dataclass
class FaultyServer(Server):
    """A server whose disk and database fail when told to."""

    def start(self) -> None:
        log = (self.data_dir / "server.log").open("ab")
        options = ("--data-dir", str(self.data_dir), "--port", str(self.port), "--warmup", "none", *self.options)
        command = [sys.executable, "-m", "tests.faults.faulty_server", "serve", str(self.model), *options]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=plain_environment())
        log.close()
        deadline = time.monotonic() + START_S
        while self.call("GET", "/ready") is None:
            assert self.process.poll() is None, (self.data_dir / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)

    @contextmanager
    def failing(self, points: Mapping[str, int], where: Mapping[str, object] | None = None) -> Iterator[None]:
        """Visits of `points` whose facts hold all of `where` fail with their error number meanwhile."""
        switch, part = self.data_dir / SWITCH, self.data_dir / f"{SWITCH}.part"
        part.write_text(json.dumps({"points": dict(points), "where": dict(where or {})}))
        part.replace(switch)
        try:
            yield
        finally:
            switch.unlink()


def _open_faulty(config: StoreConfig) -> Stores:
    return open_stores(config, faults=SwitchedFaults(config.data_dir / SWITCH))


if __name__ == "__main__":
    server.open_stores = _open_faulty  # type: ignore[attr-defined,assignment]
    cli.main()
