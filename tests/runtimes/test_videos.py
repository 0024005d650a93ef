"""Videos driven step by step equal those of the library call, together or alone, dropped or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from helios_serve.config import ModelConfig
from helios_serve.errors import InvalidRequestError
from helios_serve.model_executor.model import load_model
from helios_serve.model_executor.runtimes.memory_request import Pictures, read_request
from helios_serve.model_executor.runtimes.videos import VideoRun, Videos
from helios_serve.offline import Helios

FIELDS: dict[str, Any] = {"size": "64x64", "num_frames": 66, "seed": 3}
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
Frames = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def helios(tiny_distilled: Path) -> Helios:
    return Helios(tiny_distilled)


@pytest.fixture
def videos(tiny_distilled: Path) -> Videos:
    return Videos(load_model(ModelConfig(model=str(tiny_distilled))))


def begun(videos: Videos, helios: Helios, prompt: str, pictures: Pictures | None = None, **fields: Any) -> VideoRun:
    """A video whose first chunk has begun."""
    body = {"prompt": prompt, **FIELDS, **fields}
    run = videos.encode(read_request(body, Pictures() if pictures is None else pictures, helios.info))
    videos.begin_chunk(run)
    return run


def finish(videos: Videos, runs: list[VideoRun]) -> list[Frames]:
    """The frames of each, every step of all that are not done in one call."""
    frames: dict[str, list[torch.Tensor]] = {run.request.request_id: [] for run in runs}
    while running := [run for run in runs if not run.is_finished]:
        videos.step(running)
        for run in running:
            assert run.error is None
            if run.latents is not None:
                frames[run.request.request_id].append(videos.frames(run))
                if not run.is_finished:
                    videos.begin_chunk(run)
    return [torch.cat(parts).numpy() for parts in frames.values()]


def native(helios: Helios, prompt: str, **fields: Any) -> Frames:
    return np.concatenate([chunk.frames for chunk in helios.generate(prompt, **{**FIELDS, **fields})])


def test_videos_of_different_sizes_share_steps_and_are_the_library_call_s(helios: Helios, videos: Videos) -> None:
    wide = {"size": "128x64", "num_frames": 40, "steps": [1, 2, 1]}
    fox, dog = finish(videos, [begun(videos, helios, "a fox"), begun(videos, helios, "a dog", **wide)])
    assert np.abs(fox.astype(int) - native(helios, "a fox")).max() <= 1
    assert np.abs(dog.astype(int) - native(helios, "a dog", **wide)).max() <= 1


@pytest.mark.parametrize(
    "pictures",
    [
        Pictures(image=Image.fromarray(PIXELS[0])),
        Pictures(image=PIXELS[0]),
        Pictures(video=[Image.fromarray(frame) for frame in PIXELS]),
        Pictures(video=PIXELS),
    ],
)
def test_pictures_in_memory_are_those_of_files(
    pictures: Pictures, helios: Helios, videos: Videos, tmp_path: Path
) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "first.png")
    np.save(tmp_path / "clip.npy", PIXELS)
    kind, name = ("video", "clip.npy") if pictures.image is None else ("image", "first.png")
    small = {"num_frames": 20, "steps": [1, 1, 1]}
    (made,) = finish(videos, [begun(videos, helios, "a fox", pictures, **small)])
    assert np.array_equal(made, native(helios, "a fox", **small, **{kind: str(tmp_path / name)}))


def test_a_changed_prompt_shows_from_the_next_chunk_on(helios: Helios, videos: Videos) -> None:
    changes = [{"prompt": "a fox"}, {"prompt": "a dog", "chunk": 1, "transition_chunks": 0}]
    expected = [chunk.latents for chunk in helios.generate(prompts=changes, **{**FIELDS, "num_frames": 99})]
    dog = begun(videos, helios, "a dog").conditioning.prompts[0]
    run = begun(videos, helios, "a fox", num_frames=99)
    videos.change_prompt(run, dog.embeds)
    for chunk in range(3):
        while run.latents is None:
            videos.step([run])
        assert torch.equal(run.latents, expected[chunk])
        if chunk < 2:
            videos.begin_chunk(run)
    assert run.is_finished


def test_a_video_that_nobody_holds_is_forgotten(helios: Helios, videos: Videos) -> None:
    run, lost = begun(videos, helios, "a fox"), begun(videos, helios, "a dog")
    videos.step([run, lost])
    assert len(videos._runner.active) == 2
    del lost
    videos.step([run])
    assert videos._runner.active == (run.request.request_id,)
    videos.drop(run)
    assert videos._runner.active == ()


def test_one_that_fails_ends_alone(helios: Helios, videos: Videos) -> None:
    run, bad = begun(videos, helios, "a fox"), begun(videos, helios, "a dog")
    videos.drop(bad)
    videos.change_prompt(bad, torch.full_like(bad.conditioning.prompts[0].embeds, torch.nan))
    videos.begin_chunk(bad)
    while run.latents is None:
        videos.step([one for one in (run, bad) if one.error is None])
    assert isinstance(bad.error, ArithmeticError)
    assert bad.is_finished
    expected = next(helios.generate("a fox", **FIELDS)).latents
    assert torch.allclose(run.latents, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("fields", "pictures", "param"),
    [
        ({"prompt": "p", "colour": "red"}, Pictures(), "colour"),
        ({"prompt": "p", "size": "65x64"}, Pictures(), "size"),
        ({"prompt": "p", "steps": [1]}, Pictures(), "steps"),
        ({"prompt": "p"}, Pictures(video=PIXELS[:20]), "video"),
        ({"prompt": "p"}, Pictures(video=[]), "video"),
        ({"prompt": "p"}, Pictures(video=[PIXELS[0], PIXELS[0, :32]]), "video"),
        ({"prompt": "p"}, Pictures(image=PIXELS[0].astype(np.float32)), "image"),  # type: ignore[arg-type]
        ({"prompt": "p"}, Pictures(image=PIXELS[0], video=PIXELS), "video"),
    ],
)
def test_what_cannot_be_served_is_refused(
    helios: Helios, fields: dict[str, Any], pictures: Pictures, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_request(fields, pictures, helios.info)
    assert refused.value.param == param
