"""Runs a video through diffusers, the oracle, and through helios_serve, and compares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import HeliosPipeline, HeliosPyramidPipeline
from PIL import Image
from torch import Tensor

from helios_serve.offline import Helios
from helios_serve.types import Frames, PromptChange, SamplingParams, VideoRequest

MAX_ABS = 2e-4
MAX_RELATIVE = 2e-5
MIN_PSNR_DB = 105.0

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One video: which checkpoint, what to condition on, and the sampling options under test."""

    checkpoint: str
    task: str = "t2v"
    size: tuple[int, int] = (128, 64)
    seed: int = 0
    num_frames: int = 33
    steps: tuple[int, ...] = (1, 1, 1)
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    amplify_first_chunk: bool = False
    skip_first_chunk: bool = False
    use_zero_init: bool = False
    zero_steps: int = 1
    image_sigmas: tuple[float, float] = (0.111, 0.135)
    video_sigmas: tuple[float, float] = (0.111, 0.135)
    video_frames: int = 40
    prompt: str = "a red fox  runs through &amp;quot;deep&amp;quot; snow"

    def __str__(self) -> str:
        default = Case(self.checkpoint)
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in ("checkpoint", "task") and getattr(self, field.name) != getattr(default, field.name)
        ]
        return " ".join([self.checkpoint, self.task, *changed])

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            width=self.size[0],
            height=self.size[1],
            num_frames=self.num_frames,
            fps=24,
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            amplify_first_chunk=self.amplify_first_chunk,
            skip_first_chunk=self.skip_first_chunk,
            use_zero_init=self.use_zero_init,
            zero_steps=self.zero_steps,
            image_noise_sigma_min=self.image_sigmas[0],
            image_noise_sigma_max=self.image_sigmas[1],
            video_noise_sigma_min=self.video_sigmas[0],
            video_noise_sigma_max=self.video_sigmas[1],
            frame_policy="reference",
            image_fit="stretch",
        )

    def media(self) -> Pixels | None:
        """[T, H, W, 3] smooth random pictures of the output's size."""
        if self.task == "t2v":
            return None
        rng = np.random.default_rng(self.seed + 1)
        count = 1 if self.task == "i2v" else self.video_frames
        coarse = rng.uniform(0, 255, (count, 4, 4, 3)).astype(np.uint8)
        return np.stack(
            [np.asarray(Image.fromarray(frame).resize(self.size, Image.Resampling.BICUBIC)) for frame in coarse]
        )


@dataclass(frozen=True)
class Video:
    """latents [1, C, 9K, h, w] float32; frames [1, F, H, W, 3] float32 in [0, 1]."""

    latents: Tensor
    frames: npt.NDArray[np.float32]


class Oracle:
    """diffusers' pipeline on one checkpoint."""

    def __init__(self, path: Path) -> None:
        is_base = '"HeliosPipeline"' in (path / "model_index.json").read_text()
        self._is_pyramid = not is_base
        cls = HeliosPipeline if is_base else HeliosPyramidPipeline
        self._pipe = cls.from_pretrained(path, dtype=torch.float32)
        self._pipe.set_progress_bar_config(disable=True)

    def run(self, case: Case) -> Video:
        params = case.params
        chunks: list[Tensor] = []
        done = 0

        def record(_pipe: object, _step: int, _timestep: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal done
            done += 1
            if done == sum(params.steps_in(len(chunks))):
                chunks.append(values["latents"].clone())
                done = 0
            return {}

        frames = self._call(case, record)
        return Video(latents=torch.cat(chunks, dim=2), frames=frames)

    @contextmanager
    def contiguous_flows(self) -> Iterator[None]:
        """Lets the transformer return contiguous tensors, which the pipeline takes for granted."""
        handle = self._pipe.transformer.register_forward_hook(lambda _module, _args, out: (out[0].contiguous(),))
        try:
            yield
        finally:
            handle.remove()

    def _call(self, case: Case, record: Callable[..., dict[str, Tensor]]) -> npt.NDArray[np.float32]:
        params = case.params
        return self._pipe(
            prompt=case.prompt,
            negative_prompt=case.negative_prompt,
            width=params.width,
            height=params.height,
            num_frames=params.num_frames,
            guidance_scale=params.guidance_scale,
            generator=torch.Generator().manual_seed(params.seed),
            callback_on_step_end=record,
            callback_on_step_end_tensor_inputs=["latents"],
            image_noise_sigma_min=params.image_noise_sigma_min,
            image_noise_sigma_max=params.image_noise_sigma_max,
            video_noise_sigma_min=params.video_noise_sigma_min,
            video_noise_sigma_max=params.video_noise_sigma_max,
            is_skip_first_chunk=params.skip_first_chunk,
            output_type="np",
            **self._media(case),
            **self._sampling(params),
        ).frames

    def _media(self, case: Case) -> dict[str, object]:
        pixels = case.media()
        if pixels is None:
            return {}
        pictures = [Image.fromarray(frame) for frame in pixels]
        return {"image": pictures[0]} if case.task == "i2v" else {"video": pictures}

    def _sampling(self, params: SamplingParams) -> dict[str, object]:
        if not self._is_pyramid:
            return {"num_inference_steps": params.steps[0]}
        return {
            "pyramid_num_inference_steps_list": list(params.steps),
            "use_zero_init": params.use_zero_init,
            "zero_steps": params.zero_steps,
            "is_amplify_first_chunk": params.amplify_first_chunk,
        }


def run_ours(helios: Helios, case: Case) -> Video:
    """The same video by helios_serve."""
    pixels = case.media()
    media = None
    if pixels is not None:
        media = Frames(data=pixels.tobytes(), num_frames=len(pixels), height=case.size[1], width=case.size[0])
    request = VideoRequest(
        request_id=str(case),
        prompts=(PromptChange(chunk=0, prompt=case.prompt),),
        params=case.params,
        negative_prompt=case.negative_prompt,
        image=media if case.task == "i2v" else None,
        video=media if case.task == "v2v" else None,
    )
    chunks = list(helios.run(request))
    pixels_out = torch.cat([chunk.pixels for chunk in chunks])
    return Video(
        latents=torch.cat([chunk.latents for chunk in chunks], dim=1)[None],
        frames=(pixels_out * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)[None].numpy(),
    )


def assert_same_video(ours: Video, reference: Video) -> None:
    """Within the limits of parity: latents 2e-4 absolute and 2e-5 relative, frames 105 dB, equal shapes."""
    assert ours.latents.shape == reference.latents.shape
    assert ours.frames.shape == reference.frames.shape
    difference = ours.latents.double() - reference.latents.double()
    assert difference.abs().max() <= MAX_ABS
    assert difference.norm() / reference.latents.double().norm() <= MAX_RELATIVE
    error = np.mean((ours.frames.astype(np.float64) - reference.frames.astype(np.float64)) ** 2)
    psnr = np.inf if error == 0 else -10 * np.log10(error)
    assert psnr >= MIN_PSNR_DB
