"""The small checkpoint gives diffusers and the engine the same video from the same seed, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_serve.offline import Helios
from tests.parity.oracle import Case, Oracle, assert_same_video, run_ours

PROMPT = "A small red ball, drifting left slowly over white."


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_diffusers_makes_the_same_video(barely_trained: Path, task: str) -> None:
    case = Case("distilled", task=task, num_frames=66, prompt=PROMPT)
    assert_same_video(run_ours(Helios(barely_trained), case), Oracle(barely_trained).run(case))
