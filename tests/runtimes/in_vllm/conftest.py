"""vLLM-Omni on a processor with tiny checkpoints; all of it is skipped where the package is not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
import pytest

from helios_serve.offline import Helios

IS_INSTALLED = find_spec("vllm_omni") is not None
collect_ignore_glob = [] if IS_INSTALLED else ["test_*.py"]
if IS_INSTALLED:
    os.environ.update(VLLM_TARGET_DEVICE="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

IS_OURS = "helios_serve" in os.environ.get("VLLM_PLUGINS", "helios_serve").split(",")
"""Whether the runtime loads this package's backend; else the tests of its defects run on its own."""

Frames = npt.NDArray[np.uint8]
SMALL: dict[str, Any] = {"size": "64x64", "seed": 7}
STARTS_WITHIN_S = 550
"""Of a server or of ranks, each of which imports the runtime; minutes where others use the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A started `vllm serve --omni`. log: what it wrote so far. work: a file of each of its processes that run the
    transformer, with one line for each forward."""

    url: str
    log: Path
    work: Path

    @property
    def num_forwards(self) -> int:
        """Of all ranks together, so far."""
        return sum(len(path.read_text().split()) for path in self.work.iterdir())


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def native() -> Callable[..., list[Frames]]:
    """`native(checkpoint, prompt, **fields)` -> the frames of each chunk as this package's own engine makes them."""
    loaded: dict[Path, Helios] = {}

    def make(checkpoint: Path, prompt: str | None = None, **fields: Any) -> list[Frames]:
        if checkpoint not in loaded:
            loaded[checkpoint] = Helios(checkpoint)
        helios = loaded[checkpoint]
        return [chunk.frames for chunk in helios.generate(prompt, **{**SMALL, **fields})]

    return make


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server(checkpoint, *flags)` -> a server, one for equal arguments; all are stopped behind the last test."""
    started: dict[object, Server] = {}
    with ExitStack() as stack:

        def start(checkpoint: Path, *flags: str) -> Server:
            key = (checkpoint, *flags)
            if key not in started:
                started[key] = stack.enter_context(_serving(checkpoint, flags, tmp_path_factory.mktemp("server")))
            return started[key]

        yield start


@pytest.fixture(scope="session")
def server(start_server: StartServer, tiny_distilled: Path) -> Server:
    """As it is started without a flag."""
    return start_server(tiny_distilled)


@pytest.fixture(scope="session")
def streaming(start_server: StartServer, tiny_distilled: Path) -> Server:
    """One that plays sessions."""
    return start_server(tiny_distilled, "--diffusion-streaming-output", *(("--max-num-seqs", "3") if IS_OURS else ()))


@contextmanager
def _serving(checkpoint: Path, flags: tuple[str, ...], folder: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(url=f"http://127.0.0.1:{port}", log=folder / "log", work=folder / "work")
    server.work.mkdir()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint), "--omni", "--port", str(port)]
    with server.log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", *flags],
            stdout=output,
            stderr=output,
            env={**os.environ, "HELIOS_WORK": str(server.work)},
        )
    try:
        _wait_until_up(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_up(server: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < until:
        assert process.poll() is None, server.log.read_text()[-4000:]
        try:
            with urlopen(f"{server.url}/health"):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(server.log.read_text()[-4000:])
