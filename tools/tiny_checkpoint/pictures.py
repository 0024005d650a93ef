"""What the transformer makes, seen through the VAE's decoder: how far its pictures are from the clip's.

Latents that differ little can look different: a small error rounds a corner. This loss teaches the transformer which
errors show, and the decoder to draw what such latents mean; the encoder stays, and with it all latents. Knows windows
of pictures and the decoder; knows no optimiser and no stage of the pyramid.
Shape letters: B examples, C channels, T latent frames, F frames, h x w latent cells, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helios_serve.model_executor.vae import WanVAE
from tools.tiny_checkpoint.latents import ClipStore
from tools.tiny_checkpoint.plans import Plan
from tools.tiny_checkpoint.progress import reduced_precision
from tools.tiny_checkpoint.render import render_chunks
from tools.tiny_checkpoint.shape_reading import shape_loss
from tools.tiny_checkpoint.train_vae import decode

_WHOLE_EVERY_STEPS, _WINDOWS_PER_WHOLE = 3, 4
_CELL = 8
"""Pixels of a latent cell."""
_WINDOW = 6
"""Cells of a window's side."""
_FIRST_FRAME_WEIGHT = 4.0
"""Of its errors in the loss: the first frame alone has a latent frame to itself, and came out dull as one of 33."""
_OUTLINE_WEIGHT, _OUTLINE_REACH, _MIN_STEP = 4.0, 2, 0.3
"""Of errors near an outline, how many pixels near is, and which difference of colours is an outline: a shape's corners
are few pixels, and alone tell it from another."""
_SHAPE_WEIGHT = 0.1
"""Of shapes that cannot be read: a guess costs as much as an error of 0.1 in every pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a step decodes: latents [B, C, T, h, w], the frames [B, 3, F, H, W] they stand for in [-1, 1], and how much
    their pixels count, [B, 1, F, H, W]. centres: of the first things, [B, F, 2]; corners: where the upper left pixel of
    each picture is, [B, 2]; x and y in pixels of the world."""

    latents: Tensor
    frames: Tensor
    counts: Tensor
    centres: Tensor
    corners: Tensor


class PictureLoss(nn.Module):
    """Mean absolute error of decoded latents, mostly in windows around the things, and which shapes they show.

    Args:
        vae: whose decoder is trained.
        mean, std: of its latents by channel, [C].
        num_windows: decoded in a step; of whole pictures, every third step, a quarter as many.
    """

    def __init__(self, vae: WanVAE, mean: Tensor, std: Tensor, num_windows: int) -> None:
        super().__init__()
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        self.vae = vae
        self.mean: Tensor
        self.std: Tensor
        self._num_windows = num_windows
        self.register_buffer("mean", mean.view(1, -1, 1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1, 1))

    def forward(
        self, store: ClipStore, plan: Plan, latents: Tensor, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss of a step by name, of some of the plan's chunks, whose normalised latents are [B, C, 9, h, w]."""
        is_whole = step % _WHOLE_EVERY_STEPS == 0
        count = min(len(latents), max(1, self._num_windows // (_WINDOWS_PER_WHOLE if is_whole else 1)))
        plan, latents = plan.first(count), latents[:count]
        pictures = _pictures(store, plan, latents)
        if not is_whole:
            pictures = _windows(pictures, plan, generator)
        with reduced_precision(latents.device):
            decoded = decode(self.vae, pictures.latents * self.std + self.mean).float()
        error = ((decoded - pictures.frames) * pictures.counts).abs()
        error[:, :, 0] *= _FIRST_FRAME_WEIGHT
        shape = shape_loss(decoded, pictures.counts > 0, plan.attributes, pictures.centres, pictures.corners)
        return {
            "whole" if is_whole else "window": error.sum() / (pictures.counts.sum() * decoded.shape[1]),
            "shape": _SHAPE_WEIGHT * shape,
        }


def _pictures(store: ClipStore, plan: Plan, latents: Tensor) -> Pictures:
    shown = [(store.clips[clip], chunk) for clip, chunk in zip(plan.clip.tolist(), plan.chunk.tolist(), strict=True)]
    frames = torch.cat([render_chunks([clip], chunk, device=latents.device) for clip, chunk in shown])
    paths = [clip.path(chunk, range(frames.shape[2])) for clip, chunk in shown]
    return Pictures(
        latents=latents,
        frames=frames,
        counts=1 + (_OUTLINE_WEIGHT - 1) * _outlines(frames),
        centres=torch.tensor(paths, device=latents.device),
        corners=torch.zeros(len(latents), 2, device=latents.device),
    )


def _outlines(frames: Tensor) -> Tensor:
    """1 where the colours on both sides of a pixel of [B, 3, F, H, W] differ, else 0: [B, 1, F, H, W]."""
    reach, is_outline = _OUTLINE_REACH, torch.zeros_like(frames[:, :1], dtype=torch.bool)
    is_outline[..., reach:-reach] |= _differ(frames[..., 2 * reach :], frames[..., : -2 * reach])
    is_outline[..., reach:-reach, :] |= _differ(frames[..., 2 * reach :, :], frames[..., : -2 * reach, :])
    return is_outline.to(frames.dtype)


def _differ(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().amax(1, keepdim=True) > _MIN_STEP


def _windows(whole: Pictures, plan: Plan, generator: torch.Generator) -> Pictures:
    """Windows of _WINDOW x _WINDOW cells near where the thing is in the middle of the chunk. The decoder takes their
    sides for the picture's: what is less than a cell from one counts only where it is."""
    size = _WINDOW
    height, width = whole.latents.shape[-2:]
    limits = torch.tensor((width - size, height - size), device=generator.device)
    cells = torch.tensor((width, height), device=generator.device)
    middle = plan.centres[:, plan.centres.shape[1] // 2] / (2 * math.pi) % 1 * cells  # (B, 2)
    drawn = torch.rand(middle.shape, generator=generator, device=generator.device)
    corners = (middle - size * drawn).round().long().clamp(min=0).minimum(limits)
    latents, frames, counts = [], [], []
    for row, (left, top) in enumerate(corners.tolist()):
        rows, columns = slice(top, top + size), slice(left, left + size)
        pixel_rows, pixel_columns = (slice(_CELL * s.start, _CELL * s.stop) for s in (rows, columns))
        latents.append(whole.latents[row, ..., rows, columns])
        frames.append(whole.frames[row, ..., pixel_rows, pixel_columns])
        is_inner = torch.zeros_like(whole.counts[row])
        inner_rows = slice(_CELL * (top + (top > 0)), _CELL * (top + size - (top + size < height)))
        inner_columns = slice(_CELL * (left + (left > 0)), _CELL * (left + size - (left + size < width)))
        is_inner[..., inner_rows, inner_columns] = 1
        counts.append((whole.counts[row] * is_inner)[..., pixel_rows, pixel_columns])
    return Pictures(
        latents=torch.stack(latents),
        frames=torch.stack(frames),
        counts=torch.stack(counts),
        centres=whole.centres,
        corners=_CELL * corners,
    )
