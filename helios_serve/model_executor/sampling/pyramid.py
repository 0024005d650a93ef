"""Moving latents between pyramid stages: down to the coarsest before the first step, up with block noise after each.

Pure functions of tensors. Source: `HeliosPyramidPipeline` of diffusers 0.42; Jin et al. 2024, "Pyramidal Flow
Matching", arXiv 2410.05954, for the renoising.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.model_executor.rope import Grid
from helios_serve.model_executor.sampling.schedule import Renoise

SINGULAR_PIVOT = 1e-7
"""Below this a pivot of the block covariance is lost in float32."""

SINGULAR_ROOT = float.fromhex("0x1.bb67aep-12")
"""Last diagonal entry of the singular block factor: 4.2286e-4, as the reference has it in float32 on a CPU."""


def shrink_noise(x: Tensor, num_stages: int) -> Tensor:
    """Noise at the coarsest stage: halved bilinearly once per further stage, doubled to keep its variance.

    [C, T, h, w] -> [C, T, h / 2^(stages-1), w / 2^(stages-1)].
    """
    frames = x.flatten(0, 1)[None]  # (1, C * T, h, w)
    for _ in range(num_stages - 1):
        half = (frames.shape[-2] // 2, frames.shape[-1] // 2)
        frames = F.interpolate(frames, size=half, mode="bilinear") * 2
    return frames[0].unflatten(0, x.shape[:2])


def enlarge(x: Tensor, renoise: Renoise, noise: Tensor) -> Tensor:
    """The start of the next finer stage: nearest-neighbour doubling, then block noise against its blocks.

    Args:
        x: [C, T, h, w], the result of the stage before.
        noise: [C, T, 2h, 2w] block noise in the transformer's dtype.
    """
    doubled = x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    return renoise.signal * doubled + renoise.noise * noise


def block_noise(shape: tuple[int, int, int, int], patch: Grid, gamma: float, generator: torch.Generator) -> Tensor:
    """Noise that is anti-correlated inside each patch, drawn on the generator's device.

    Args:
        shape: (C, T, h, w) of the stage that begins.
        patch: (1, ph, pw), the block whose cells are correlated.
        gamma: correlation strength of the scheduler.

    Returns: [C, T, h, w] float32.
    """
    c, t, h, w = shape
    _, ph, pw = patch
    z = torch.randn(c * t * (h // ph) * (w // pw), ph * pw, generator=generator, device=generator.device)
    blocks = (z @ _block_factor(ph * pw, gamma).T).view(c, t, h // ph, w // pw, ph, pw)
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(shape)


@lru_cache(maxsize=8)
def _block_factor(size: int, gamma: float) -> Tensor:
    """Cholesky factor of the block covariance (1 + gamma) I - gamma J, float32 on the CPU.

    At gamma = 1 / (size - 1) the matrix is singular. The reference adds 1e-8, which float32 loses, so that its last
    diagonal entry is rounding, and on some processors its factorisation fails; `SINGULAR_ROOT` is the definition here.
    """
    factor = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i):
            factor[i, j] = (-gamma - factor[i, :j] @ factor[j, :j]) / factor[j, j]
        pivot = 1.0 - float(factor[i, :i].square().sum())
        factor[i, i] = math.sqrt(pivot) if pivot > SINGULAR_PIVOT else SINGULAR_ROOT
    return factor.float()
