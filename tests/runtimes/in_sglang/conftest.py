"""SGLang-Diffusion on a processor with tiny checkpoints; all of it is skipped where the package is not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import numpy.typing as npt
import pytest

from helios_serve.offline import Helios

IS_INSTALLED = find_spec("sglang") is not None
collect_ignore_glob = [] if IS_INSTALLED else ["test_*.py"]
if IS_INSTALLED:
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

IS_OURS = "helios_serve" in os.environ.get("SGLANG_PLUGINS", "helios_serve").split(",")
"""Whether the runtime loads this package's backend; else the tests of its defects run on its own."""
if not IS_OURS:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its own backend compiles its norms, which takes a C++ compiler

Frames = npt.NDArray[np.uint8]
SMALL: dict[str, Any] = {"size": "64x64", "seed": 7}
STEPS = {"base": [2], "mid": [1, 2, 1], "distilled": [1, 2, 1]}
STARTS_WITHIN_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A started `sglang serve`. log: what it wrote so far."""

    url: str
    log: Path
    variant: str


StartServer = Callable[..., Server]
Native = Callable[..., Frames]


@pytest.fixture(scope="session")
def native() -> Native:
    """`native(checkpoint, prompt, **fields)` -> the frames that this package's own engine makes."""
    loaded: dict[Path, Helios] = {}

    def make(checkpoint: Path, prompt: str | None = None, **fields: Any) -> Frames:
        if checkpoint not in loaded:
            loaded[checkpoint] = Helios(checkpoint)
        chunks = loaded[checkpoint].generate(prompt, **{**SMALL, **fields})
        return np.concatenate([chunk.frames for chunk in chunks])

    return make


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server(checkpoint, *flags)` -> a server, stopped behind the module's last test."""
    with ExitStack() as stack:

        def start(checkpoint: Path, *flags: str) -> Server:
            folder = tmp_path_factory.mktemp("server")
            port = free_port()
            command = [str(Path(sys.executable).parent / "sglang"), "serve", "--model-path", str(checkpoint)]
            own = ["--port", str(port), "--dit-precision", "fp32", "--output-path", str(folder)]
            with (folder / "log").open("wb") as output:
                process = subprocess.Popen([*command, *own, *flags], stdout=output, stderr=output, cwd=folder)
            stack.callback(stop, process)
            server = Server(url=f"http://127.0.0.1:{port}", log=folder / "log", variant=checkpoint.name)
            wait_until_up(server, [process])
            return server

        yield start


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until_up(server: Server, processes: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < until:
        assert all(process.poll() is None for process in processes), server.log.read_text()[-4000:]
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(server.log.read_text()[-4000:])


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
