"""What a request knows before its first chunk: prompt embeddings and its starting history.

Knows the text encoder, the VAE's encoder and the order in which the reference draws random numbers; knows nothing of
steps or schedules. A request draws from its own CPU generator on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.model_executor.batch import ChunkInput
from helios_serve.model_executor.history import (
    History,
    empty_history,
    seeded_history,
)
from helios_serve.model_executor.prompt_schedule import PromptEmbedding, embedding_at
from helios_serve.model_executor.vae import WanVAE, sample_posterior
from helios_serve.model_executor.vae_spread import encode_whole
from helios_serve.parallel.collectives import ALONE, Axis
from helios_serve.types import (
    FRAMES_PER_CHUNK,
    LATENT_FRAMES_PER_CHUNK,
    NUM_TRAIL_CHUNKS,
    Frames,
    PromptChange,
    SamplingParams,
    VideoRequest,
)

ENCODE_SLAB_FRAMES, ENCODE_SLAB_FRAMES_ON_CPU = 4, 1
"""Latent frames that the VAE encodes at a time: few, for little memory. On a CPU as the reference: sums keep its order
with any number of threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """The encoder's result for one request.

    `prompts` has one embedding per entry of `schedule`; `negative` is set when guidance is used. `history` is what
    chunk 0 begins from.
    """

    params: SamplingParams
    schedule: tuple[PromptChange, ...]
    prompts: tuple[PromptEmbedding, ...]
    negative: PromptEmbedding | None
    history: History

    def chunk_input(
        self, task_id: str, request_id: str, chunk: int, history: History, generator_state: bytes
    ) -> ChunkInput:
        """The input of one chunk, which sees `history` and begins from `generator_state`."""
        return ChunkInput(
            task_id=task_id,
            request_id=request_id,
            chunk=chunk,
            params=self.params,
            prompt=embedding_at(chunk, self.schedule, self.prompts),
            negative=self.negative,
            history=history,
            generator_state=generator_state,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        texts = self.prompts if self.negative is None else (*self.prompts, self.negative)
        first = () if self.history.first is None else (self.history.first,)
        return (*(text.embeds for text in texts), self.history.frames, *first)


def fresh_generator_state(seed: int) -> bytes:
    """Of a request's generator before its first draw."""
    return torch.Generator().manual_seed(seed).get_state().numpy().tobytes()


def starting_history(request: VideoRequest, vae: WanVAE, generator: torch.Generator, axis: Axis = ALONE) -> History:
    """The history before the first chunk, drawing from `generator` as the reference does.

    Args:
        axis: its ranks share the encoding; they call with equal requests and generators.
    """
    if request.image is not None:
        return _image_history(request.image, request.params, vae, generator, axis)
    if request.video is not None:
        return _video_history(request.video, request.params, vae, generator, axis)
    scale = vae.config.scale_factor_spatial
    height, width = request.params.height // scale, request.params.width // scale
    return empty_history(vae.config.z_dim, height, width, _device(vae))


def _image_history(
    image: Frames, params: SamplingParams, vae: WanVAE, generator: torch.Generator, axis: Axis
) -> History:
    """Image-to-video: the image's latent is pinned, and the last frame of a still clip of it stands before chunk 0."""
    pixels = _to_pixels(image, vae)
    first = _encode(vae, pixels, generator, axis)
    still = _encode(vae, pixels.expand(-1, -1, FRAMES_PER_CHUNK, -1, -1), generator, axis)[:, :, -1:]
    image_sigmas = (params.image_noise_sigma_min, params.image_noise_sigma_max)
    video_sigmas = (params.video_noise_sigma_min, params.video_noise_sigma_max)
    first = _add_noise(first, image_sigmas, 1, generator)
    still = _add_noise(still, video_sigmas, 1, generator)
    return seeded_history(still[0], first[0])


def _video_history(
    video: Frames, params: SamplingParams, vae: WanVAE, generator: torch.Generator, axis: Axis
) -> History:
    """Video-to-video: whole chunks are encoded from the end backwards; frame 0 of the input is pinned.

    Only the chunks that reach into the history window are encoded, but every chunk draws its noise.
    """
    pixels = _to_pixels(video, vae)
    num_chunks = video.num_frames // FRAMES_PER_CHUNK
    start = video.num_frames - num_chunks * FRAMES_PER_CHUNK
    num_needed = min(num_chunks, NUM_TRAIL_CHUNKS)
    first = _encode(vae, pixels[:, :, :1], generator, axis)
    chunks: list[Tensor | None] = []
    for index in range(num_chunks):
        at = start + index * FRAMES_PER_CHUNK
        if index < num_chunks - num_needed:
            _draw(_chunk_shape(first), generator)
            chunks.append(None)
        else:
            chunks.append(_encode(vae, pixels[:, :, at : at + FRAMES_PER_CHUNK], generator, axis))
    first = _add_noise(first, (params.image_noise_sigma_min, params.image_noise_sigma_max), 1, generator)
    video_sigmas = (params.video_noise_sigma_min, params.video_noise_sigma_max)
    noisy = []
    for latents in chunks:
        if latents is None:
            torch.rand(LATENT_FRAMES_PER_CHUNK, generator=generator)
            _draw(_chunk_shape(first), generator)
        else:
            noisy.append(_add_noise(latents, video_sigmas, LATENT_FRAMES_PER_CHUNK, generator))
    return seeded_history(torch.cat(noisy, dim=2)[0], first[0])


def _encode(vae: WanVAE, pixels: Tensor, generator: torch.Generator, axis: Axis) -> Tensor:
    """A sample of the normalised posterior: [1, 3, T, H, W] -> [1, C, t, h, w] float32."""
    slab_frames = ENCODE_SLAB_FRAMES_ON_CPU if pixels.device.type == "cpu" else ENCODE_SLAB_FRAMES
    mean, logvar = encode_whole(vae, pixels, slab_frames, axis)
    noise = _draw(tuple(mean.shape), generator).to(mean.device, mean.dtype)
    return vae.normalize(sample_posterior(mean, logvar, noise)).float()


def _add_noise(latents: Tensor, sigmas: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Blends noise into latents [1, C, T, h, w]; `count` is 1 for one level, T for one level per frame."""
    low, high = sigmas
    sigma = (torch.rand(count, generator=generator) * (high - low) + low).view(1, 1, count, 1, 1).to(latents.device)
    noise = _draw(tuple(latents.shape), generator).to(latents.device)
    return sigma * noise + (1 - sigma) * latents


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _chunk_shape(frame: Tensor) -> tuple[int, ...]:
    """The latent shape of a whole chunk, from that of one latent frame."""
    return (*frame.shape[:2], LATENT_FRAMES_PER_CHUNK, *frame.shape[3:])


def _to_pixels(frames: Frames, vae: WanVAE) -> Tensor:
    """uint8 RGB -> [1, 3, T, H, W] in [-1, 1], in the VAE's dtype and on its device."""
    raw = torch.frombuffer(bytearray(frames.data), dtype=torch.uint8)
    pixels = raw.view(frames.num_frames, frames.height, frames.width, 3).to(_device(vae))
    unit = pixels.permute(3, 0, 1, 2)[None].float() / 255.0
    return (2.0 * unit - 1.0).to(_dtype(vae))


def _device(vae: WanVAE) -> torch.device:
    return next(vae.parameters()).device


def _dtype(vae: WanVAE) -> torch.dtype:
    return next(vae.parameters()).dtype
