"""A checkpoint that went through every command of the training for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.tiny_checkpoint.build import build
from tools.tiny_checkpoint.presets import FlowTraining, Preset, VaeTraining
from tools.tiny_checkpoint.progress import Run

PRESET = Preset(
    vae=VaeTraining(base_dim=4, num_res_blocks=1, steps=20, batch=2, window=16, pictures=1, frames=5),
    flow=FlowTraining(
        num_heads=3,
        num_layers=2,
        ffn_dim=64,
        text_dim=16,
        word_steps=5,
        steps=20,
        batch=(3, 2, 2),
        num_clips=2,
        two_share=0.5,
        num_windows=2,
    ),
)


@pytest.fixture(scope="session")
def preset() -> Preset:
    """Sizes of which a step takes milliseconds."""
    return PRESET


@pytest.fixture(scope="session")
def barely_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that comes of it."""
    work = tmp_path_factory.mktemp("work")
    return build(PRESET, Run(work=work, device=torch.device("cpu"), seed=0, has_new_vae=True))


@pytest.fixture(scope="session")
def work(barely_trained: Path) -> Path:
    """The work directory after all trainings."""
    return barely_trained.parent
