"""Schedules and solvers against diffusers' schedulers, step by step on random flows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import HeliosDMDScheduler, HeliosPyramidPipeline, HeliosScheduler
from diffusers.pipelines.helios.pipeline_helios import calculate_shift

from helios_serve.model_executor.guidance import cfg_zero_star
from helios_serve.model_executor.model_config import SchedulerConfig
from helios_serve.model_executor.sampling.base import UniPCMemory, UniPCOrders, euler_step, unipc_step
from helios_serve.model_executor.sampling.dmd import dmd_step
from helios_serve.model_executor.sampling.pyramid import block_noise
from helios_serve.model_executor.sampling.schedule import StageSchedule, chunk_schedule

LIMIT = 1e-6


def _config(scheduler: HeliosScheduler | HeliosDMDScheduler) -> SchedulerConfig:
    return SchedulerConfig.from_json({"_class_name": type(scheduler).__name__, **scheduler.config})


def _mu(num_tokens: int) -> float:
    return calculate_shift(num_tokens, 256, 4096, 0.5, 1.15)


def _assert_same_tables(theirs: HeliosScheduler | HeliosDMDScheduler, ours: StageSchedule) -> None:
    """Equal to the last bit: one different bit can change a timestep that is truncated."""
    assert theirs.sigmas.tolist() == list(ours.sigmas)
    assert theirs.timesteps.tolist() == list(ours.timesteps)


def _assert_same_trajectory(theirs: HeliosScheduler, ours: StageSchedule, orders: UniPCOrders) -> None:
    x = torch.randn(16, 9, 4, 6)
    mine, memory = x.clone(), None
    solver = theirs.config.scheduler_type
    for step, timestep in enumerate(theirs.timesteps):
        flow = torch.randn_like(x)
        x = theirs.step(flow[None], timestep, x[None], return_dict=False)[0][0]
        if solver == "unipc":
            mine, memory = unipc_step(mine, flow, ours, step, memory, orders)
        else:
            mine = euler_step(mine, flow, ours, step)
        torch.testing.assert_close(mine, x, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
@pytest.mark.parametrize(
    ("dynamic", "shift_type", "solver"),
    list(itertools.product([True, False], ["exponential", "linear"], ["unipc", "euler"])),
)
def test_base(steps: int, dynamic: bool, shift_type: str, solver: str) -> None:
    theirs = HeliosScheduler(
        stages=1,
        stage_range=[0, 1],
        use_dynamic_shifting=dynamic,
        time_shift_type=shift_type,
        scheduler_type=solver,
    )
    theirs.set_timesteps(steps, sigmas=np.linspace(0.999, 0.0, steps + 1)[:-1], mu=_mu(288))
    (ours,) = chunk_schedule(_config(theirs), (steps,), (288,)).stages
    _assert_same_tables(theirs, ours)
    assert ours.model_timesteps == ours.timesteps
    _assert_same_trajectory(theirs, ours, UniPCOrders())


@pytest.mark.parametrize(("order", "lower_final"), [(1, True), (1, False), (2, False)])
def test_unipc_orders(order: int, lower_final: bool) -> None:
    theirs = HeliosScheduler(stages=3, use_dynamic_shifting=True, solver_order=order, lower_order_final=lower_final)
    ours = chunk_schedule(_config(theirs), (6, 6, 6), (72, 288, 1152)).stages[1]
    theirs.set_timesteps(6, 1, mu=_mu(72))
    _assert_same_trajectory(theirs, ours, UniPCOrders(solver_order=order, lower_order_final=lower_final))


@pytest.mark.parametrize("steps", [(1, 2, 3, 2), (2, 2, 2, 2), (20, 5, 10, 7)])
@pytest.mark.parametrize(
    ("cls", "dynamic", "shift_type", "num_stages"),
    list(itertools.product([HeliosScheduler, HeliosDMDScheduler], [True, False], ["exponential", "linear"], [2, 3, 4])),
)
@pytest.mark.parametrize("amplified", [False, True])
def test_pyramid(
    cls: type, dynamic: bool, shift_type: str, num_stages: int, steps: tuple[int, ...], amplified: bool
) -> None:
    if amplified and cls is HeliosScheduler:
        return  # only the distilled scheduler amplifies
    stage_range = [i / num_stages for i in range(num_stages)] + [1]
    theirs = cls(stages=num_stages, stage_range=stage_range, use_dynamic_shifting=dynamic, time_shift_type=shift_type)
    num_tokens = tuple(72 * 4**stage for stage in range(num_stages))
    factor = 2 if amplified else 1
    schedule = chunk_schedule(_config(theirs), tuple(factor * n for n in steps[:num_stages]), num_tokens)
    for stage, ours in enumerate(schedule.stages):
        mu = _mu(num_tokens[max(0, stage - 1)])
        theirs.set_timesteps(steps[stage], stage, mu=mu, is_amplify_first_chunk=amplified)
        _assert_same_tables(theirs, ours)
        assert [int(t) for t in theirs.timesteps] == list(ours.model_timesteps)
        if cls is HeliosScheduler:
            _assert_same_trajectory(theirs, ours, UniPCOrders())
        else:
            _assert_same_dmd_trajectory(theirs, ours)


@pytest.mark.parametrize(("shift", "gamma"), [(3.0, 1 / 3), (1.0, 0.2), (0.5, 0.1)])
def test_pyramid_with_other_constants(shift: float, gamma: float) -> None:
    theirs = HeliosDMDScheduler(shift=shift, gamma=gamma)
    schedule = chunk_schedule(_config(theirs), (2, 3, 4), (72, 288, 1152))
    for stage, ours in enumerate(schedule.stages):
        theirs.set_timesteps((2, 3, 4)[stage], stage)
        _assert_same_tables(theirs, ours)


@pytest.mark.parametrize("cls", [HeliosScheduler, HeliosDMDScheduler])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("num_train_timesteps", [100, 2000, 3000])
def test_other_numbers_of_training_timesteps(cls: type, dynamic: bool, num_train_timesteps: int) -> None:
    """Above 1000 a stage's timesteps may rise, for the reference caps its first one at 999."""
    theirs = cls(num_train_timesteps=num_train_timesteps, use_dynamic_shifting=dynamic)
    schedule = chunk_schedule(_config(theirs), (2, 3, 4), (72, 288, 1152))
    for stage, ours in enumerate(schedule.stages):
        theirs.set_timesteps((2, 3, 4)[stage], stage, mu=_mu((72, 72, 288)[stage]))
        _assert_same_tables(theirs, ours)


def test_published_distilled_timesteps() -> None:
    """The values that the official 640x384 checkpoint uses, plain and with an amplified first chunk."""
    config = SchedulerConfig(solver="dmd", use_dynamic_shifting=True, time_shift_type="linear")
    num_tokens = (540, 2160, 8640)
    plain = chunk_schedule(config, (2, 2, 2), num_tokens)
    assert [stage.model_timesteps for stage in plain.stages] == [(998, 833), (742, 512), (385, 174)]
    amplified = chunk_schedule(config, (4, 4, 4), num_tokens)
    assert [stage.model_timesteps for stage in amplified.stages] == [
        (998, 902, 833, 783),
        (742, 607, 512, 441),
        (385, 274, 174, 84),
    ]
    renoise = [(stage.signal, stage.noise) for stage in plain.renoise if stage is not None]
    assert renoise == [(0.6001201440528393, 0.6926122274238059), (0.7498129216760419, 0.4333367310543098)]


def _assert_same_dmd_trajectory(theirs: HeliosDMDScheduler, ours: StageSchedule) -> None:
    x = start = torch.randn(16, 9, 4, 6)
    mine = x.clone()
    for step, timestep in enumerate(theirs.timesteps):
        flow = torch.randn_like(x)
        x = theirs.step(
            flow[None],
            timestep,
            x[None],
            return_dict=False,
            cur_sampling_step=step,
            dmd_noisy_tensor=start[None],
            dmd_sigmas=theirs.sigmas,
            dmd_timesteps=theirs.timesteps,
            all_timesteps=theirs.timesteps,
        )[0][0]
        mine = dmd_step(mine, flow, start, ours, step)
        torch.testing.assert_close(mine, x, rtol=LIMIT, atol=LIMIT)


def test_solver_dtypes_in_bfloat16() -> None:
    """UniPC stays float32, Euler and the last DMD step take the flow's dtype, other DMD steps the start's."""
    schedule = chunk_schedule(SchedulerConfig(use_dynamic_shifting=True), (3, 3, 3), (72, 288, 1152)).stages[0]
    x, flow = torch.randn(16, 9, 2, 2), torch.randn(16, 9, 2, 2, dtype=torch.bfloat16)
    assert unipc_step(x, flow, schedule, 0, None, UniPCOrders())[0].dtype == torch.float32
    assert euler_step(x, flow, schedule, 0).dtype == torch.bfloat16
    assert dmd_step(x, flow, x, schedule, 0).dtype == torch.float32
    assert dmd_step(x, flow, x, schedule, 2).dtype == torch.bfloat16


def test_block_noise_equals_the_pipeline() -> None:
    class Stub:
        scheduler = HeliosDMDScheduler()

    theirs = HeliosPyramidPipeline.sample_block_noise(
        Stub(), 1, 16, 9, 8, 12, (1, 2, 2), torch.device("cpu"), torch.Generator().manual_seed(3)
    )
    ours = block_noise((16, 9, 8, 12), (1, 2, 2), 1 / 3, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-6)
    blocks = ours.unfold(2, 2, 2).unfold(3, 2, 2)
    assert blocks.sum((-1, -2)).abs().max() < 2e-3  # the cells of a block cancel
    assert ours.std() > 0.9


def test_cfg_zero_star_projects_the_unconditional_flow() -> None:
    uncond = torch.randn(16, 9, 4, 4)
    cond = 2.5 * uncond
    torch.testing.assert_close(cfg_zero_star(cond, uncond, 7.0), cond)


def test_memory_is_replaced_not_grown() -> None:
    schedule = chunk_schedule(SchedulerConfig(use_dynamic_shifting=True), (5, 5, 5), (72, 288, 1152)).stages[0]
    x, memory = torch.randn(16, 9, 2, 2), None
    for step in range(5):
        x, memory = unipc_step(x, torch.randn_like(x), schedule, step, memory, UniPCOrders())
    assert isinstance(memory, UniPCMemory)
    assert memory.order == 1
