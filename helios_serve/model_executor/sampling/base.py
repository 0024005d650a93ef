"""Flow-matching solvers for one stage: UniPC (order 1 or 2, B2 variant, predicting the clean sample) and Euler.

Pure functions: a step takes the noisy x, the predicted flow, the stage's schedule and the step index, and returns the
next x. UniPC's memory travels as an argument. Coefficients are float64 host numbers, rounded to the tensors' dtype
where they are multiplied; nothing is read back from a device.
Source: Zhao et al. 2023, "UniPC", arXiv 2302.04867, and `HeliosScheduler` of diffusers 0.42.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from helios_serve.model_executor.sampling.schedule import StageSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class UniPCMemory:
    """What a UniPC step leaves for the next one in its stage.

    `clean` is the predicted clean sample of the last step, `older` of the one before; `last` is the corrected sample
    that the last prediction started from; `order` is the order of that prediction.
    """

    clean: Tensor
    older: Tensor | None
    last: Tensor
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UniPCOrders:
    """Settings of the multistep solver: highest order, and whether the last steps fall back to lower ones."""

    solver_order: int = 2
    lower_order_final: bool = True

    def at(self, step: int, num_steps: int) -> int:
        """Order of the prediction at `step`: warm-up from 1, and down again at the end."""
        order = min(self.solver_order, step + 1)
        return min(order, num_steps - step) if self.lower_order_final else order


def euler_step(x: Tensor, flow: Tensor, schedule: StageSchedule, step: int) -> Tensor:
    """One Euler step, float32 inside, in the dtype of `flow`."""
    delta = schedule.sigmas[step + 1] - schedule.sigmas[step]
    return (x.float() + delta * flow).to(flow.dtype)


def unipc_step(
    x: Tensor,
    flow: Tensor,
    schedule: StageSchedule,
    step: int,
    memory: UniPCMemory | None,
    orders: UniPCOrders,
) -> tuple[Tensor, UniPCMemory]:
    """One UniPC step: correct x with the new prediction, then predict the next x.

    Args:
        x, flow: of one shape; `x` float32.
        memory: what the step before returned; None at step 0.
    """
    sigmas = schedule.sigmas
    clean = x - sigmas[step] * flow
    older = None
    if memory is not None:
        x = _correct(x, clean, memory, sigmas, step)
        older = memory.clean
    order = orders.at(step, schedule.num_steps)
    following = _predict(x, clean, older if order == 2 else None, sigmas, step)
    return following, UniPCMemory(clean=clean, older=older, last=x, order=order)


def _predict(x: Tensor, clean: Tensor, older: Tensor | None, sigmas: tuple[float, ...], step: int) -> Tensor:
    """x at sigma[step + 1] from x at sigma[step]; second order with `older`, the clean sample of the step before."""
    h = _log_snr(sigmas[step + 1]) - _log_snr(sigmas[step])
    signal, growth = 1 - sigmas[step + 1], math.expm1(-h)
    following = _floor(sigmas[step + 1]) / _floor(sigmas[step]) * x - signal * growth * clean
    if older is None:
        return following
    rk = (_log_snr(sigmas[step - 1]) - _log_snr(sigmas[step])) / h
    return following - signal * growth * (0.5 * ((older - clean) / rk))


def _correct(x: Tensor, clean: Tensor, memory: UniPCMemory, sigmas: tuple[float, ...], step: int) -> Tensor:
    """x at sigma[step] once more, now that the clean sample predicted there is known."""
    h = _log_snr(sigmas[step]) - _log_snr(sigmas[step - 1])
    signal, growth = 1 - sigmas[step], math.expm1(-h)
    again = _floor(sigmas[step]) / _floor(sigmas[step - 1]) * memory.last - signal * growth * memory.clean
    change = clean - memory.clean
    if memory.order == 1:
        return again - signal * growth * (0.5 * change)
    assert memory.older is not None
    rk = (_log_snr(sigmas[step - 2]) - _log_snr(sigmas[step - 1])) / h
    phi = growth / -h - 1
    b1, b2 = phi / growth, 2 * (phi / -h - 0.5) / growth
    rho = np.linalg.solve(np.array([[1.0, 1.0], [rk, 1.0]]), np.array([b1, b2]))
    past = float(rho[0]) * ((memory.older - memory.clean) / rk)
    return again - signal * growth * (past + float(rho[1]) * change)


def _floor(sigma: float) -> float:
    return max(sigma, 1e-8)


def _log_snr(sigma: float) -> float:
    """lambda = log(1 - sigma) - log(sigma)."""
    return math.log(1 - sigma) - math.log(_floor(sigma))
