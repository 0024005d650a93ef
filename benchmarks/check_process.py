"""Figures of a process that starts: what an import loads and costs, and what a server needs until it answers.

Knows the package's entry points and processes; knows nothing of what they import.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks import paired
from benchmarks.check_figures import Figure

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ("helios_serve", "helios_serve.cli", "helios_serve.api.service")
"""What users of the library, the command line and a server import first."""
HEAVY = ("torch", "transformers", "triton", "ray", "diffusers", "huggingface_hub", "av", "numpy", "grpc", "rich")
"""Packages that take long to import, of which an entry may need none."""
START_TIMEOUT_S = 240.0

_CHILD = """
import importlib, json, sys, time
sys.path.append(sys.argv[2])
from benchmarks import paired
paired.yardstick()
own = min(paired.thread_cpu_s(paired.yardstick) for _ in range(3))
before = set(sys.modules)
seconds = paired.thread_cpu_s(lambda: importlib.import_module(sys.argv[1]))
print(json.dumps({"ratio": seconds / own, "modules": sorted(set(sys.modules) - before)}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Imported:
    """ratio: CPU time over that of the yardstick."""

    ratio: float
    modules: frozenset[str]


def import_figures(
    root: Path = ROOT,
    *,
    repeats: int = 5,
    counts_instructions: bool = True,
    entries: Sequence[str] = ENTRIES,
) -> list[Figure]:
    """Of each entry point: modules, heavy packages among them, and CPU time.

    Args:
        root: the directory that holds the package.
        repeats: processes whose fastest counts.
        counts_instructions: also the instructions of the processor, by valgrind, where that is installed.
    """
    figures: list[Figure] = []
    for entry in entries:
        seen = [_imported(entry, root) for _ in range(repeats + 1)][1:]  # the first one may compile
        ratio, modules = min(one.ratio for one in seen), seen[0].modules
        figures += [
            Figure(name=f"import/{entry}/modules", value=len(modules), unit="modules", margin=0.05, slack=4),
            Figure(name=f"import/{entry}/heavy", value=len(modules & set(HEAVY)), unit="packages"),
            Figure(name=f"import/{entry}/cpu", value=ratio, unit="yardsticks", margin=0.3, slack=0.3),
        ]
        if counts_instructions and shutil.which("valgrind"):
            number = _instructions(entry, root)
            name = f"import/{entry}/instructions"
            figures.append(Figure(name=name, value=number, unit="instr.", margin=0.05, needs="valgrind"))
    return figures


def _imported(entry: str, root: Path) -> _Imported:
    done = _run([sys.executable, "-c", _CHILD, entry, str(ROOT)], root)
    told = json.loads(done.stdout)
    return _Imported(ratio=told["ratio"], modules=frozenset(told["modules"]))


def _instructions(entry: str, root: Path) -> int:
    """Of the import alone: a process with it, less one without."""
    return _instructions_of(f"import {entry}", root) - _instructions_of("", root)


@cache
def _instructions_of(code: str, root: Path) -> int:
    tool = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    told = _run([*tool, sys.executable, "-c", code], root).stderr
    found = re.search(r"I\s+refs:\s+([\d,]+)", told)
    assert found is not None, told
    return int(found[1].replace(",", ""))


def _run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    """In `root`, whose packages win over those that are installed."""
    environment = {**_environment(), "PYTHONHASHSEED": "0", "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)


def _environment() -> dict[str, str]:
    """Bytecode is kept, whatever the caller's shell says: what is measured is an import and no compilation."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def start_figures(*, repeats: int = 2) -> list[Figure]:
    """Of a server with a tiny checkpoint on the CPU, from its start until it says that it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny"
        _run([sys.executable, "-m", "helios_serve.cli", "make-tiny", "--out", str(checkpoint)], ROOT)
        started = [_started(checkpoint, Path(folder) / f"data{number}") for number in range(repeats)]
    return [Figure(name="start/tiny_server/cpu", value=min(started), unit="yardsticks", margin=0.35)]


def _started(checkpoint: Path, data_dir: Path) -> float:
    """CPU time until a server is ready, over the yardstick's before and behind: on an idle core, its start time."""
    yardsticks = [paired.thread_cpu_s(paired.yardstick) for _ in range(3)]
    with _server(checkpoint, data_dir) as (process, port):
        _wait_ready(process, port)
        cpu_s = paired.process_cpu_s(process.pid)
    yardsticks += [paired.thread_cpu_s(paired.yardstick) for _ in range(3)]
    return cpu_s / statistics.median(yardsticks)


@contextmanager
def _server(checkpoint: Path, data_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = _free_port()
    options = ["--port", str(port), "--data-dir", str(data_dir), "--warmup", "none", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "helios_serve.cli", "serve", str(checkpoint), *options],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Raises: RuntimeError when the server ends, or is not ready in time."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {START_TIMEOUT_S:g} s")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
