"""Several ranks that the runtime starts share each forward: the video of one rank, whatever the token counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from helios_serve.types import Variant
from tests.conftest import MakeCheckpoint
from tests.runtimes.in_vllm.conftest import Frames
from tests.runtimes.in_vllm.omni import frames_of, omni, prompt_of, sampling, worst

STEPS = {"base": [3], "mid": [1, 2, 1], "distilled": [1, 1, 1]}
PROMPTS = ["a fox", "a dog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    variant: Variant
    settings: dict[str, Any]


STEP_BATCHES = {"step_execution": True, "max_num_seqs": 2}
CASES = {
    "ulysses-2-steps": Case(variant="distilled", settings={"ulysses_degree": 2, **STEP_BATCHES}),
    "ring-2": Case(variant="base", settings={"ring_degree": 2}),
    "cfg-2-steps": Case(variant="mid", settings={"cfg_parallel_size": 2, **STEP_BATCHES}),
    "ulysses-2-ring-2": Case(variant="distilled", settings={"ulysses_degree": 2, "ring_degree": 2}),
    "cfg-2-ulysses-2": Case(variant="mid", settings={"cfg_parallel_size": 2, "ulysses_degree": 2}),
}
"""At 64x64 the stages have 9, 36 and 144 current tokens, and histories of odd lengths before them."""


@pytest.mark.parametrize("name", CASES)
def test_ranks_make_the_video_of_one(
    name: str, make_checkpoint: MakeCheckpoint, native: Callable[..., list[Frames]]
) -> None:
    case = CASES[name]
    checkpoint, steps = make_checkpoint(case.variant), STEPS[case.variant]
    with omni(checkpoint, **case.settings) as started:
        outputs = started.generate(PROMPTS, sampling(num_frames=66, extra_args={"steps": steps}))
    assert {prompt_of(output) for output in outputs} == set(PROMPTS)
    for output in outputs:
        expected = np.concatenate(native(checkpoint, prompt_of(output), num_frames=66, steps=steps))
        assert worst(frames_of(output), expected) <= 1


def test_degrees_that_do_not_fit_are_refused_with_what_does(
    make_checkpoint: MakeCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """The workers say it; the runtime's own error has it only if their end is not noticed first."""
    with pytest.raises(RuntimeError), omni(make_checkpoint("base"), ulysses_degree=3):
        pass
    said, until = "", time.monotonic() + 60
    while "must divide the 4 heads" not in said:
        assert time.monotonic() < until, said[-4000:]
        time.sleep(0.2)
        said += "".join(capfd.readouterr())
