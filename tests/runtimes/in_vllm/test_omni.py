"""`Omni(checkpoint)`: every variant, request mode and step mode, alone and together, equal to this package's engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helios_serve.model_executor.runtimes.videos import VideoRun, Videos
from tests.conftest import MakeCheckpoint
from tests.runtimes.in_vllm.conftest import Frames
from tests.runtimes.in_vllm.omni import frames_of, omni, prompt_of, sampling

PROMPTS = ["a fox", "a dog", "a cat"]
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
MODES: dict[str, dict[str, Any]] = {
    "requests": {"max_num_seqs": 3, "request_batch_max_wait_ms": 500.0},
    "steps": {"step_execution": True, "max_num_seqs": 3},
}


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_every_variant_and_task_is_that_of_the_engine(
    variant: str, make_checkpoint: MakeCheckpoint, native: Callable[..., list[Frames]], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(variant)
    Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
    np.save(tmp_path / "clip.npy", PIXELS)
    steps = [2] if variant == "base" else [1, 2, 1]
    tasks: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"image": Image.fromarray(PIXELS[0])}, {"image": str(tmp_path / "first.png")}),
        ({"video": [Image.fromarray(frame) for frame in PIXELS]}, {"video": str(tmp_path / "clip.npy")}),
    ]
    with omni(checkpoint) as started:
        for media, files in tasks:
            prompt = {"prompt": "a fox", **({"multi_modal_data": media} if media else {})}
            (output,) = started.generate(prompt, sampling(extra_args={"steps": steps}))
            expected = np.concatenate(native(checkpoint, "a fox", num_frames=40, steps=steps, **files))
            assert np.array_equal(frames_of(output), expected), files


@pytest.mark.parametrize("mode", MODES)
def test_requests_share_forwards_and_are_those_of_the_engine(
    mode: str, tiny_distilled: Path, native: Callable[..., list[Frames]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = Videos.step

    def counted(videos: Videos, runs: list[VideoRun]) -> None:
        sizes.append(len(runs))
        step(videos, runs)

    with omni(tiny_distilled, **MODES[mode]) as started:
        monkeypatch.setattr(Videos, "step", counted)
        outputs = started.generate(PROMPTS, sampling(num_frames=66))
    assert len(outputs) == 3
    assert max(sizes) == 3
    assert sum(sizes) == 3 * 18  # 12 steps in the first chunk, 6 in the second
    for output in outputs:
        expected = np.concatenate(native(tiny_distilled, prompt_of(output), num_frames=66))
        assert np.abs(frames_of(output).astype(int) - expected).max() <= 1


def test_latents_are_returned_when_they_are_asked_for(tiny_distilled: Path) -> None:
    with omni(tiny_distilled) as started:
        (output,) = started.generate("a fox", sampling(output_type="latent"))
    (latents,) = output.images
    assert tuple(latents.shape)[-4:] == (16, 18, 8, 8)
