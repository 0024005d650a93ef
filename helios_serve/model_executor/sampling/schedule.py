"""Precomputed sampling schedules: timesteps, sigmas and stage constants of one chunk.

Knows a scheduler's configuration, token counts and step counts; knows nothing of tensors on devices or of requests.
All arithmetic is float64. Source: `HeliosScheduler` and `HeliosDMDScheduler` of diffusers 0.42.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from helios_serve.model_executor.model_config import SchedulerConfig

Floats = npt.NDArray[np.float64]

FIRST_SIGMA = 0.999
"""Where every stage's sigma grid begins."""

LAST_STAGE_END = 0.9999999999999999
"""End ratio of the last stage: just below 1, so that its index stays inside the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSchedule:
    """The steps of one stage: `sigmas` has one entry more than `timesteps`, the last being 0.

    `model_timesteps` are what the transformer is given: fractional for one stage, truncated to integers in a pyramid.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    model_timesteps: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renoise:
    """How a stage begins from the upsampled result of the one before: `signal * x + noise * block_noise`."""

    signal: float
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSchedule:
    """The stages of one chunk, coarse to fine; `renoise[s]` is how stage s > 0 begins (None for stage 0)."""

    stages: tuple[StageSchedule, ...]
    renoise: tuple[Renoise | None, ...]


@lru_cache(maxsize=256)
def chunk_schedule(config: SchedulerConfig, steps: tuple[int, ...], num_tokens: tuple[int, ...]) -> ChunkSchedule:
    """The schedule of a chunk.

    Args:
        config: the checkpoint's scheduler.
        steps: transformer evaluations of each stage, amplification included.
        num_tokens: current tokens of each stage at its own resolution.
    """
    if config.stages == 1:
        return ChunkSchedule(stages=(_single_stage(config, steps[0], num_tokens[0]),), renoise=(None,))
    pyramid = _pyramid(config)
    stages, renoise = [], []
    for index, count in enumerate(steps):
        # The shift uses the size before this stage's upsampling (quirk of the reference, kept).
        mu = _shift_exponent(config, num_tokens[max(0, index - 1)])
        stages.append(_pyramid_stage(config, pyramid[index], count, mu))
        renoise.append(None if index == 0 else _renoise(config, pyramid[index].start_sigma))
    return ChunkSchedule(stages=tuple(stages), renoise=tuple(renoise))


def shift_sigmas(sigmas: Floats, mu: float, kind: str) -> Floats:
    """Time shifting towards high noise: M / (M + 1/sigma - 1) with M = exp(mu) or mu; 0 stays 0.

    The division is a product with the reciprocal, as PyTorch divides a number by a tensor: one different last bit
    could change a timestep that is truncated to an integer.
    """
    strength = math.exp(mu) if kind == "exponential" else mu
    with np.errstate(divide="ignore"):
        shifted: Floats = strength * (1 / (strength + (1 / sigmas - 1)))
    return shifted


def _shift_exponent(config: SchedulerConfig, num_tokens: int) -> float:
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return num_tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def _single_stage(config: SchedulerConfig, steps: int, num_tokens: int) -> StageSchedule:
    sigmas = np.append(np.linspace(FIRST_SIGMA, 0.0, steps + 1)[:-1], 0.0)
    if config.use_dynamic_shifting:
        sigmas = shift_sigmas(sigmas, _shift_exponent(config, num_tokens), config.time_shift_type)
    timesteps = tuple((sigmas[:-1] * config.num_train_timesteps).tolist())
    return StageSchedule(timesteps=timesteps, sigmas=tuple(sigmas.tolist()), model_timesteps=timesteps)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PyramidStage:
    """Range of one stage on the training grid: `start_sigma` before correction, timesteps from `first` to `last`."""

    start_sigma: float
    first: float
    last: float


@lru_cache(maxsize=16)
def _pyramid(config: SchedulerConfig) -> tuple[_PyramidStage, ...]:
    """Splits the training timesteps between the stages in proportion to the length of their flows."""
    total = config.num_train_timesteps
    noise = 1.0 - np.linspace(1, 1 / total, total + 1)
    sigmas = np.flip(config.shift * noise / (1 + (config.shift - 1) * noise))[:-1]
    timesteps = sigmas * total
    starts, lengths = [], []
    for index in range(config.stages):
        start = float(sigmas[int(config.stage_range[index] * total)])
        end_index = min(int(config.stage_range[index + 1] * total), total)
        end = float(sigmas[end_index]) if end_index < total else 0.0
        starts.append(start)
        lengths.append((start if index == 0 else _corrected_start(config, start)) - end)
    stages = []
    for index, start in enumerate(starts):
        begin_ratio = sum(lengths[:index]) / sum(lengths)
        end_ratio = sum(lengths[: index + 1]) / sum(lengths) if index < config.stages - 1 else LAST_STAGE_END
        highest = min(float(timesteps[int(begin_ratio * total)]), 999.0)
        lowest = float(timesteps[min(int(end_ratio * total), total - 1)])
        grid = np.linspace(highest, lowest, total + 1)[:-1]
        stages.append(_PyramidStage(start_sigma=start, first=float(grid[0]), last=float(grid[-1])))
    return tuple(stages)


def _corrected_start(config: SchedulerConfig, start_sigma: float) -> float:
    """Sigma at which a stage really starts once block noise was added to keep the variance."""
    signal = 1 - start_sigma
    return 1 - signal / (math.sqrt(1 + 1 / config.gamma) * (1 - signal) + signal)


def _renoise(config: SchedulerConfig, start_sigma: float) -> Renoise:
    signal = 1 - start_sigma
    alpha = 1 / (math.sqrt(1 + 1 / config.gamma) * (1 - signal) + signal)
    return Renoise(signal=alpha, noise=alpha * (1 - signal) / math.sqrt(config.gamma))


def _pyramid_stage(config: SchedulerConfig, stage: _PyramidStage, steps: int, mu: float) -> StageSchedule:
    is_dmd = config.solver == "dmd"
    points = steps + 1 if is_dmd else steps
    total = config.num_train_timesteps
    lowest_sigma = float(np.linspace(FIRST_SIGMA, 0, total + 1)[-2])
    sigmas = np.append(np.linspace(FIRST_SIGMA, lowest_sigma, points), 0.0)
    timesteps = np.linspace(stage.first, stage.last, points)
    if is_dmd:
        timesteps, sigmas = timesteps[:-1], np.delete(sigmas, -2)
    if config.use_dynamic_shifting:
        sigmas = shift_sigmas(sigmas, mu, config.time_shift_type)
        # Above 1000 training timesteps the reference's cap at 999 may leave a stage whose range rises.
        low, high = sorted((stage.first, stage.last))
        timesteps = low + sigmas[:-1] * (high - low)
    return StageSchedule(
        timesteps=tuple(timesteps.tolist()),
        sigmas=tuple(sigmas.tolist()),
        model_timesteps=tuple(float(int(t)) for t in timesteps),
    )
