"""The shipped checkpoint gives diffusers and the engine the same video from the same seed, in float32."""

from __future__ import annotations

import pytest

from helios_serve.config import EMBEDDED_MODEL
from helios_serve.offline import Helios
from tests.parity.oracle import Case, Oracle, assert_same_video, run_ours

PROMPT = "A small red ball, drifting left slowly over white."


@pytest.fixture(scope="module")
def helios() -> Helios:
    return Helios(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(EMBEDDED_MODEL)


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 2, 2)])
def test_diffusers_makes_the_same_video(helios: Helios, oracle: Oracle, task: str, steps: tuple[int, ...]) -> None:
    case = Case("distilled", task=task, steps=steps, num_frames=66, prompt=PROMPT)
    assert_same_video(run_ours(helios, case), oracle.run(case))
