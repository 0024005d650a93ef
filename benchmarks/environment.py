"""What a number depends on and nobody passed in: the source, the device, the versions; clocks and power over time.

Knows git, NVML and the packages that a benchmark may use; measures no work.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "transformers", "diffusers", "fa3-fwd", "flashinfer-python", "xformers", "nvidia-ml-py")
"""Whose versions are recorded, or that they are absent; torch and triton are needed."""
_PERIOD_S = 0.1
_QUANTITIES = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
_SMI_FIELDS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which source ran. dirty: with changes that the commit lacks; None: nobody can tell."""

    commit: str | None
    dirty: bool | None
    tree_sha256: str


def source(commit: str | None = None, *, is_dirty: bool = False) -> Source:
    """By git. A copy of the tree without git is what its sender says it is; the digest tells whether that was true."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if head is None:
        return Source(commit=commit, dirty=None if commit is None else is_dirty, tree_sha256=tree_digest(ROOT))
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--", "helios_serve", "benchmarks/*.py"])
    return Source(commit=head, dirty=changes != "", tree_sha256=tree_digest(ROOT))


def tree_digest(root: Path) -> str:
    """Of the names and bytes of all files that a benchmark can run or read."""
    digest = hashlib.sha256()
    package = [path for suffix in ("py", "json") for path in (root / "helios_serve").rglob(f"*.{suffix}")]
    for path in sorted([*package, *(root / "benchmarks").glob("*.py")]):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the result's file; "absent" for a package that is not there."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    versions |= {package: _version(package) for package in PACKAGES}
    if device.type != "cuda":
        return {"device": platform.machine(), "count": 0, "cores": os.cpu_count(), "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    versions |= {"cuda": torch.version.cuda or "absent", "cudnn": str(torch.backends.cudnn.version())}
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"])
    return {
        "device": properties.name,
        "count": torch.cuda.device_count(),
        "driver": driver or "absent",
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "versions": versions,
    }


def missing(environment: Mapping[str, Any]) -> list[str]:
    """What a result may not lack."""
    versions = environment["versions"]
    needed = {name: versions.get(name) for name in ("torch", "triton", "cuda", "cudnn")}
    needed["driver"] = environment.get("driver")
    return [name for name, found in needed.items() if found in (None, "absent", "None")]


def unpack_wheels(folder: Path, unpacked: Path) -> None:
    """All packages of a folder of wheels into one folder, which can be a part of PYTHONPATH then."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)


@dataclass(slots=True, kw_only=True)
class Sampler:
    """Reads clocks, power and temperature ten times a second in the background, while it is entered."""

    times: list[float] = field(default_factory=list)
    rows: list[tuple[float, ...]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self, device: torch.device) -> None:
        """Does nothing on a device that has no such readings."""
        read = _reader(device)
        if read is not None:
            self._thread = threading.Thread(target=self._run, args=(read,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Waits for the last reading."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def since(self, start: float) -> dict[str, list[float]]:
        """Minimum, median and maximum of each quantity from that `time.monotonic` on; empty without readings."""
        rows = [row for moment, row in zip(self.times, list(self.rows), strict=False) if moment >= start]
        columns = zip(_QUANTITIES, zip(*rows, strict=True), strict=True) if rows else ()
        return {name: _extent(column) for name, column in columns}

    def _run(self, read: Callable[[], tuple[float, ...]]) -> None:
        while not self._stop.wait(_PERIOD_S):
            row = read()
            self.times.append(time.monotonic())
            self.rows.append(row)


def _extent(column: Sequence[float]) -> list[float]:
    ordered = sorted(column)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _reader(device: torch.device) -> Callable[[], tuple[float, ...]] | None:
    """By NVML, else by nvidia-smi; the first that answers."""
    for make in (_nvml_reader, _smi_reader) if device.type == "cuda" else ():
        try:
            read = make(device)
            read()
        except Exception:  # NVML has an error class of its own, where it is installed
            continue
        return read
    return None


def _nvml_reader(device: torch.device) -> Callable[[], tuple[float, ...]]:
    pynvml = importlib.import_module("pynvml")  # of machines with such a device
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)

    def read() -> tuple[float, ...]:
        return (
            float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        )

    return read


def _smi_reader(device: torch.device) -> Callable[[], tuple[float, ...]]:
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]

    def read() -> tuple[float, ...]:
        answer = _output(command)
        assert answer is not None, "nvidia-smi has stopped answering"
        return tuple(float(one) for one in answer.split(","))

    return read


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _output(command: Iterable[str]) -> str | None:
    """What it prints; None where it fails or is not there."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
