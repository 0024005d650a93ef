"""A training that is begun again from its seed goes the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools.tiny_checkpoint.latents import encode_clips
from tools.tiny_checkpoint.presets import PRESETS
from tools.tiny_checkpoint.progress import Run
from tools.tiny_checkpoint.train_flow import train_flow

RECORDED_LOSSES = {"stage0": 0.423623, "middle0": 0.168691, "stage1": 0.404725, "stage2": 0.502284}
"""Of the last 20 of 200 steps, the first 100 of words alone, in float32."""


@pytest.mark.quality
def test_two_hundred_steps_give_the_recorded_losses(tmp_path: Path) -> None:
    """The shipped sizes and the kept VAE, with fewer clips and examples, so that it takes two minutes, or ten
    where a processor does not compute with bfloat16. Rounding grows with the steps, and is larger where it does."""
    preset = PRESETS["cpu"]
    flow = replace(preset.flow, word_steps=100, steps=200, batch=(16, 8, 4), num_clips=16, num_windows=1)
    run = Run(work=tmp_path, device=torch.device("cpu"), seed=0)
    encode_clips(replace(preset, flow=flow), run)
    train_flow(replace(preset, flow=flow), run)
    last = json.loads((tmp_path / "flow.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["step"] == 200
    assert {name: last[name] for name in RECORDED_LOSSES} == pytest.approx(RECORDED_LOSSES, rel=0.05)
