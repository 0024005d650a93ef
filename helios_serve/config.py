"""Settings of a process, one frozen dataclass per concern, validated on construction. No I/O, no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which checkpoint runs, and where.

    `dtype` is that of the transformer and the text encoder; the VAE runs in float32, as the official pipelines do.
    """

    model: str
    device: Device = "cpu"
    dtype: DType = "float32"

    @property
    def served_name(self) -> str:
        """What clients call the model: the last part of the directory or hub id."""
        return Path(self.model).resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine.

    max_pack: requests whose chunks are denoised together. max_requests: accepted and unfinished ones.
    """

    max_pack: int = 4
    max_requests: int = 256

    def __post_init__(self) -> None:
        if self.max_pack < 1:
            raise ValueError(f"max_pack {self.max_pack}: must be at least 1")
        if self.max_requests < 1:
            raise ValueError(f"max_requests {self.max_requests}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens and keeps its files."""

    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: Path

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port}: must be 0 to 65535")
        if not self.is_loopback:
            raise ValueError(
                f"host {self.host}: without API keys the server listens on loopback addresses only; use 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or (_is_address(self.host) and ip_address(self.host).is_loopback)


def default_data_dir() -> Path:
    """HELIOS_DATA_DIR, else helios-serve in the user's data directory."""
    chosen = os.environ.get("HELIOS_DATA_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "helios-serve"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
