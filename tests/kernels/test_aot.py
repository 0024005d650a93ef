"""Every Triton kernel compiles for the GPUs that are served, without spilling and with wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels_aot.json"
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = ("attend_", "cross_attention_")
"""How the names of kernels begin that multiply matrices."""
INTERLEAVED = {"rgb_to_yuv420"}
"""It reads pixels of three channels, which lie side by side: no wide loads."""
NARROW = {"gelu_quantize_rows_2048x16w"}
"""Eight bytes for a thread, measured on an H100 to be the fastest."""
GROWTH = 8
"""Registers that a kernel may take beyond what was recorded; more is looked at, and recorded anew."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: kernels that were imported for the interpreter cannot be compiled."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "helios_serve.kernels.aot", "--json", str(path)]
    subprocess.run(command, env=environment, check=True, timeout=600)
    return json.loads(path.read_text())


def test_kernels_stay_within_registers_and_shared_memory(compiled: dict[str, Any]) -> None:
    assert len(compiled["kernels"]) >= 96
    for usage in compiled["kernels"]:
        assert usage["registers"] <= 255, usage
        assert usage["stack_bytes"] == 0, usage
        assert usage["shared_bytes"] <= SHARED_LIMIT_BYTES[usage["capability"]], usage
        assert usage["matrix_products"] > 0 or not usage["kernel"].startswith(MATRIX), usage
        assert usage["wide_loads"] > 0 or usage["kernel"] in INTERLEAVED | NARROW, usage


def test_what_kernels_take_is_what_was_recorded(compiled: dict[str, Any]) -> None:
    recorded = json.loads(RECORDED.read_text())
    if recorded["triton"] != compiled["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}, this is {compiled['triton']}")
    before, now = (
        {(usage["kernel"], usage["capability"]): usage for usage in run["kernels"]} for run in (recorded, compiled)
    )
    assert before.keys() == now.keys(), "record anew: python -m helios_serve.kernels.aot --json FILE"
    for key, usage in now.items():
        assert usage["registers"] <= before[key]["registers"] + GROWTH, (usage, before[key])
        assert usage["shared_bytes"] <= before[key]["shared_bytes"], (usage, before[key])
