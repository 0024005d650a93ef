"""What was tuned for a device is launched there, and compiled ahead of time; nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helios_serve.kernels import launch
from helios_serve.kernels.launch import NUM_WARPS, num_warps, tuning_key, warps_for

CUDA = torch.device("cuda", 0)


def _some_kernel() -> None: ...


@pytest.fixture
def tuned_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A device for which 4 warps were the best for one kernel and block."""
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"Some GPU": {"num_warps": {"some_kernel/8192": 4}}}))
    monkeypatch.setattr(launch, "TUNED", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    launch.tuned.cache_clear()
    launch.read_tuned.cache_clear()
    yield
    launch.tuned.cache_clear()
    launch.read_tuned.cache_clear()


@pytest.mark.usefixtures("tuned_device")
def test_tuned_number_of_warps_is_launched() -> None:
    assert tuning_key(_some_kernel, 8192) == "some_kernel/8192"
    assert num_warps(_some_kernel, 8192, CUDA) == 4
    assert num_warps(_some_kernel, 4096, CUDA) == warps_for(4096)
    assert num_warps(_some_kernel, 8192, torch.device("cpu")) == warps_for(8192)


@pytest.mark.usefixtures("tuned_device")
def test_other_devices_launch_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Another GPU")
    assert num_warps(_some_kernel, 8192, CUDA) == warps_for(8192)


def test_shipped_table_holds_candidates() -> None:
    for tables in launch.read_tuned().values():
        assert {*tables.get("num_warps", {}).values()} <= {*NUM_WARPS}


@pytest.mark.parametrize(("width", "warps"), [(40, 1), (1024, 1), (5120, 8), (13824, 16)])
def test_default_is_32_values_per_thread(width: int, warps: int) -> None:
    assert warps_for(launch.block_of(width)) == warps
