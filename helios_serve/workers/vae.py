"""The VAE role: the latents of a chunk become pixels, and pixels become the chunk's segment.

Knows the VAE's decoder and the segment encoder; keeps nothing between chunks. One thread uses a worker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels import rgb_to_yuv420
from helios_serve.model_executor.vae import WanVAE
from helios_serve.types import FRAMES_PER_CHUNK, SamplingParams, Segment
from helios_serve.workers.segment import SegmentSpec, encode_segment


class VaeWorker:
    """Decodes chunks on their own, each with an empty temporal cache."""

    def __init__(self, vae: WanVAE) -> None:
        self._vae = vae
        self._weight = next(vae.parameters())

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [C, 9, h, w] -> pixels [33, 3, H, W] in [-1, 1], in the VAE's dtype."""
        own = latents.to(self._weight.device, self._weight.dtype)[None]
        pixels = self._vae.decode(self._vae.denormalize(own))
        return pixels[0].transpose(0, 1)

    @torch.inference_mode()
    def encode_segment(self, pixels: Tensor, request_id: str, chunk: int, params: SamplingParams) -> Segment:
        """The fMP4 segment of a decoded chunk, cut to the frames that belong to the video (at least one)."""
        num_frames = params.frames_in(chunk)
        spec = SegmentSpec(width=params.width, height=params.height, fps=params.fps, crf=params.crf, codec=params.codec)
        yuv = rgb_to_yuv420(pixels[:num_frames]).cpu().numpy()
        start_frame = FRAMES_PER_CHUNK * chunk
        init, media = encode_segment(yuv, spec, chunk, start_frame)
        return Segment(
            request_id=request_id,
            chunk=chunk,
            start_frame=start_frame,
            num_frames=num_frames,
            init=init,
            media=media,
        )
