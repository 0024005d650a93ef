"""Several ranks through SGLang's own launcher make the videos of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helios_serve.errors import UnsupportedOperationError
from tests.conftest import MakeCheckpoint
from tests.runtimes.in_sglang.conftest import STEPS, Native
from tests.runtimes.in_sglang.started import frames_of, generator

pytestmark = pytest.mark.timeout(1800)  # each process that SGLang starts imports for half a minute


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("distilled", {"num_gpus": 2}),
        ("distilled", {"num_gpus": 2, "ring_degree": 2, "ulysses_degree": 1, "sp_degree": 2}),
        ("base", {"num_gpus": 2, "enable_cfg_parallel": True}),
        ("mid", {"num_gpus": 4, "enable_cfg_parallel": True}),
        ("distilled", {"num_gpus": 4, "ulysses_degree": 4}),
    ],
)
def test_ranks_make_the_videos_of_one(
    variant: str, settings: dict[str, Any], make_checkpoint: MakeCheckpoint, native: Native
) -> None:
    """64 x 64 pixels are 4 x 4 tokens a frame, 9 frames: history and stages do not divide evenly."""
    checkpoint = make_checkpoint(variant)
    steps = STEPS[variant]
    with generator(checkpoint, **settings) as started:
        for prompt in ("a fox", "a dog"):
            frames = frames_of(started, prompt, api_fields={"steps": steps})
            expected = native(checkpoint, prompt, num_frames=66, steps=steps)
            assert np.abs(frames.astype(int) - expected).max() <= 1


def test_degrees_that_do_not_fit_are_refused(tiny_distilled: Path) -> None:
    with pytest.raises((UnsupportedOperationError, ValueError)), generator(tiny_distilled, num_gpus=2, tp_size=2):
        pass
