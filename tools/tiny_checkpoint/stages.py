"""What the transformer learns at each pyramid stage: from where the sampler stands, the flow to the clean chunk at the
stage's resolution.

Every stage ends at the clean chunk, so that one step a stage is enough. In the first stage the noise decides where
things start: their centres are angles of its lowest harmonics (see `couple`), which makes the clip a function of noise
and caption, and its regression a sampler. Knows latents and noise; knows no model and no words.
Shape letters: B examples, C channels, T frames, h x w the grid of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.model_executor.model_config import SchedulerConfig
from helios_serve.model_executor.sampling.pyramid import enlarge
from helios_serve.model_executor.sampling.schedule import ChunkSchedule, Renoise, chunk_schedule
from tools.tiny_checkpoint.batched_flow import Past
from tools.tiny_checkpoint.latents import ClipStore
from tools.tiny_checkpoint.plans import Plan

NUM_STAGES = 3
PLACE_CHANNELS, X_CHANNEL = 3, 0
"""Channels of the noise that tell where a thing starts, and which of them tells x."""
_MAX_STEPS = 4
_MAX_STAGE_ERROR = 0.2
"""Standard deviation of what is added, at most, to the end of one stage where the next begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBatch:
    """One stage's part of a step: noisy x and the flow to predict, both [B, C, 9, h, w]."""

    x: Tensor
    flow: Tensor


def schedules(scheduler: SchedulerConfig, num_tokens: tuple[int, ...]) -> list[ChunkSchedule]:
    """The sampler's, for 1 to 4 steps per stage."""
    return [chunk_schedule(scheduler, (steps,) * NUM_STAGES, num_tokens) for steps in range(1, _MAX_STEPS + 1)]


def first_stage(clean: Tensor, plan: Plan, generator: torch.Generator) -> StageBatch:
    """From noise that tells where things start to the means of clean chunks [B, C, 9, h, w]."""
    target = shrink(clean, NUM_STAGES - 1)
    noise = torch.randn(target.shape, generator=generator, device=target.device)
    return _between(target, couple(noise, plan.angles), plan.sigma)


def later_stage(clean: Tensor, plan: Plan, before: Tensor, renoise: Renoise, generator: torch.Generator) -> StageBatch:
    """From what the stage before ended with, `before`, enlarged and with block noise, to the means of clean chunks."""
    start = enlarge(before, renoise, _block_noise(before.shape, generator))
    halvings = (clean.shape[-1] // start.shape[-1]).bit_length() - 1
    return _between(shrink(clean, halvings), start, plan.sigma)


def _between(target: Tensor, start: Tensor, sigma: Tensor) -> StageBatch:
    return StageBatch(x=torch.lerp(target, start, sigma.view(-1, 1, 1, 1, 1)), flow=start - target)


def nearly(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` [B, ...] with errors such as a stage makes, of a level of its own for each example."""
    level = torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator, device=x.device)
    return x + _MAX_STAGE_ERROR * level * torch.randn(x.shape, generator=generator, device=x.device)


def draw_past(store: ClipStore, plan: Plan, generator: torch.Generator) -> Past:
    """What each example sees, with noise blended into each frame by a level of its own; frames of zeros, which stand
    for nothing, stay so."""
    first, frames = store.past(plan.clip, plan.chunk, plan.has_image, plan.is_made)
    both = torch.cat((first, frames), dim=2)
    level = torch.rand(len(both), 1, both.shape[2], 1, 1, generator=generator, device=both.device)
    level = level * plan.corruption.view(-1, 1, 1, 1, 1)
    noise = torch.randn(both.shape, generator=generator, device=both.device)
    is_empty = both.abs().amax((1, 3, 4), keepdim=True) == 0
    mixed = torch.where(is_empty, 0.0, level * noise + (1 - level) * both)
    return Past(first=mixed[:, :, :1], frames=mixed[:, :, 1:])


def shrink(x: Tensor, halvings: int) -> Tensor:
    """Means of blocks of latents [B, C, T, h, w]."""
    size = 2**halvings
    return F.avg_pool3d(x, (1, size, size)) if halvings else x


def couple(noise: Tensor, angles: Tensor) -> Tensor:
    """Turns the lowest harmonics of the coarsest noise [B, C, T, h, w] by angles [B, A], x and y of each thing.

    Two even patterns (see `_place_patterns`) for each angle make a vector of the noise's projections; the angle becomes
    its direction, where it is not NaN. Its length and all that is orthogonal to the patterns stay, and angles are drawn
    evenly, so that the noise is still white. Means along time and columns are what attention finds most easily, and
    those of a column tell how far from it the thing is.
    """
    patterns = _place_patterns(angles.shape[1], noise.shape[1:]).to(noise.device)  # (A, 2, C, T, h, w)
    parts = torch.einsum("bcthw,apcthw->bap", noise, patterns)
    turned = parts.norm(dim=-1, keepdim=True) * torch.stack((angles.cos(), angles.sin()), dim=-1)
    change = torch.where(angles.isnan()[..., None], 0.0, turned - parts)
    turned_noise: Tensor = noise + torch.einsum("bap,apcthw->bcthw", change, patterns)
    return turned_noise


@cache
def _place_patterns(num_angles: int, shape: tuple[int, ...]) -> Tensor:
    """Orthonormal patterns [A, 2, C, T, h, w]: for x of a thing cosine and sine over the columns of one channel, for y
    the upper against the lower half in each of two channels."""
    _, _, height, width = shape
    patterns = torch.zeros(num_angles // 2, 2, 2, *shape)
    turns = 2 * math.pi * (torch.arange(width) + 0.5) / width
    halves = torch.where(torch.arange(height) < height / 2, 1.0, -1.0)[:, None]
    for thing, (x, y) in enumerate(patterns):
        channel = PLACE_CHANNELS * thing + X_CHANNEL
        x[0, channel], x[1, channel] = turns.cos(), turns.sin()
        y[0, channel + 1], y[1, channel + 2] = halves, halves
    flat = patterns.flatten(0, 1)
    unit: Tensor = flat / flat.flatten(2).norm(dim=-1).view(*flat.shape[:2], 1, 1, 1, 1)
    return unit


def _block_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The sampler's block noise at gamma = 1/3 on twice the grid of `shape`: covariance 4/3 I - 1/3 J in each block."""
    z = torch.randn(*shape, 4, generator=generator, device=generator.device)
    blocks = math.sqrt(4 / 3) * (z - z.mean(-1, keepdim=True))
    rows = blocks.unflatten(-1, (2, 2)).permute(0, 1, 2, 3, 5, 4, 6)
    noise: Tensor = rows.reshape(*shape[:3], 2 * shape[3], 2 * shape[4])
    return noise
