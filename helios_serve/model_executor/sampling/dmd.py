"""The sampler of distilled checkpoints (distribution matching distillation).

Pure functions: each step predicts the clean sample and mixes it with the stage's own starting latents, not with fresh
noise. Source: `HeliosDMDScheduler` of diffusers 0.42.
"""

from __future__ import annotations

from torch import Tensor

from helios_serve.model_executor.sampling.schedule import StageSchedule


def dmd_step(x: Tensor, flow: Tensor, stage_start: Tensor, schedule: StageSchedule, step: int) -> Tensor:
    """One DMD step.

    Args:
        x, flow, stage_start: of one shape; `stage_start` is what the stage began from.

    Returns: the next x in the dtype of `stage_start`; after the last step the clean sample in the dtype of `flow`.
    """
    clean = (x.double() - _nearest_sigma(schedule, step) * flow.double()).to(flow.dtype)
    if step + 1 == schedule.num_steps:
        return clean
    sigma = _nearest_sigma(schedule, step + 1)
    return ((1 - sigma) * clean.double() + sigma * stage_start.double()).to(stage_start.dtype)


def _nearest_sigma(schedule: StageSchedule, step: int) -> float:
    """Sigma of the table timestep nearest to the truncated timestep of `step`; the first of equals."""
    wanted = schedule.model_timesteps[step]
    distances = [abs(t - wanted) for t in schedule.timesteps]
    return schedule.sigmas[distances.index(min(distances))]
