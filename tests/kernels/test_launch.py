"""What was tuned for a device is launched there, and compiled ahead of time; nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helios_serve.kernels import launch
from helios_serve.kernels.launch import RowPlan, candidate_plans, default_plan, row_key, row_plan

CUDA = torch.device("cuda", 0)
BEST = RowPlan(block=2048, num_warps=16)


def _some_kernel() -> None: ...


@pytest.fixture
def tuned_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A device for which `BEST` was the best for one kernel and width."""
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"Some GPU": {"rows": {"some_kernel/5120": asdict(BEST)}}}))
    monkeypatch.setattr(launch, "TUNED", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    launch.tuned.cache_clear()
    launch.read_tuned.cache_clear()
    yield
    launch.tuned.cache_clear()
    launch.read_tuned.cache_clear()


@pytest.mark.usefixtures("tuned_device")
def test_tuned_plan_is_launched() -> None:
    assert row_key(_some_kernel, 5120) == "some_kernel/5120"
    assert row_plan(_some_kernel, 5120, CUDA) == BEST
    assert row_plan(_some_kernel, 4096, CUDA) == default_plan(4096)
    assert row_plan(_some_kernel, 5120, torch.device("cpu")) == default_plan(5120)


@pytest.mark.usefixtures("tuned_device")
def test_other_devices_launch_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Another GPU")
    assert row_plan(_some_kernel, 5120, CUDA) == default_plan(5120)


@pytest.mark.usefixtures("tuned_device")
def test_what_a_tuner_tries_is_launched() -> None:
    launch.tuned("rows", CUDA)[row_key(_some_kernel, 4096)] = asdict(BEST)
    assert row_plan(_some_kernel, 4096, CUDA) == BEST


def test_shipped_table_holds_candidates() -> None:
    for tables in launch.read_tuned().values():
        for key, plan in tables.get("rows", {}).items():
            assert RowPlan(**plan) in candidate_plans(int(key.partition("/")[2])), key


@pytest.mark.parametrize(
    ("width", "block", "warps"), [(40, 16, 1), (1024, 128, 1), (5120, 1024, 4), (13824, 2048, 8), (130, 32, 1)]
)
def test_default_is_eight_values_per_thread_and_part(width: int, block: int, warps: int) -> None:
    assert default_plan(width) == RowPlan(block=block, num_warps=warps)


@pytest.mark.parametrize("width", [40, 96, 130, 5120, 13824])
def test_parts_cover_a_row_with_little_waste(width: int) -> None:
    block = default_plan(width).block
    assert block == 16 or -width % block < width / 8 + 16


@pytest.mark.parametrize(("width", "count"), [(5120, 8), (13824, 7)])
def test_candidates_are_the_default_and_what_lies_around_it(width: int, count: int) -> None:
    plans = candidate_plans(width)
    assert plans[0].block == default_plan(width).block
    assert default_plan(width) in plans
    assert len({*plans}) == len(plans) == count
    assert all(4 <= plan.block / (32 * plan.num_warps) <= 16 for plan in plans)


def test_a_kernel_has_the_defaults_of_its_operator() -> None:
    """Devices are given fewer arguments than callers give where those are the defaults."""

    def halve(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale

    with pytest.raises(AssertionError, match="scale of halve needs a default"):
        launch.operator("halve(Tensor x, float scale=0.5) -> Tensor", reference=halve, kernel=halve, shapes=halve)
