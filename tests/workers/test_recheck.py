"""Golden chunks made again by groups that are up: beside running chunks, with broken weights, and by every rank."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helios_serve.config import ExecutorConfig, ModelConfig
from helios_serve.faults import Fault
from helios_serve.model_executor.model import HeliosModel, load_model
from helios_serve.types import GroupUp, TaskDone
from tests.workers.chunks import request
from tests.workers.test_local_executor import Driver

WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tiny_distilled: Path) -> HeliosModel:
    return load_model(ModelConfig(model=str(tiny_distilled)))


@pytest.fixture
def driver(model: HeliosModel) -> Iterator[Driver]:
    made = Driver(model)
    made.start()
    yield made
    made.executor.close(10)


def test_an_idle_group_makes_the_chunk_of_its_start_again(driver: Driver) -> None:
    for _ in range(2):
        (check,) = driver.executor.recheck(WAIT_S)
        assert (check.group, check.expected) == ("dit-0", driver.ups["dit-0"].golden)
        assert check.is_right, check


def test_a_group_that_is_not_up_has_no_check(model: HeliosModel) -> None:
    assert Driver(model).executor.recheck(WAIT_S) == ()


def test_a_running_chunk_is_as_it_would_have_been(model: HeliosModel) -> None:
    """The check is made between two of its steps."""
    driver = Driver(model, Fault(point="dit.step", action="sleep", times=1000, seconds=0.05))
    driver.start()
    try:
        video = request("v")
        start = driver.begin(video)
        alone = driver.next(TaskDone, driver.chunk(video, start, []))
        found: list[bool] = []
        task_id = driver.chunk(video, start, [])
        checking = threading.Thread(target=lambda: found.extend(c.is_right for c in driver.executor.recheck(WAIT_S)))
        checking.start()
        disturbed = driver.next(TaskDone, task_id)
        checking.join()
        assert found == [True]
        assert disturbed.generator_state == alone.generator_state
        assert driver.executor.read(disturbed.latents) == driver.executor.read(alone.latents)
    finally:
        driver.executor.close(10)


def test_other_weights_are_found_out_and_the_group_goes_on(driver: Driver, model: HeliosModel) -> None:
    weight = next(each for name, each in model.transformer.named_parameters() if "ffn" in name and each.dim() == 2)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1.0
        (wrong,) = driver.executor.recheck(WAIT_S)
        assert not wrong.is_right
        assert (wrong.problem, wrong.found == wrong.expected) == (None, False)
        with torch.no_grad():
            weight.fill_(float("nan"))
        (failed,) = driver.executor.recheck(WAIT_S)
        assert (failed.is_right, failed.found) == (False, None)
        assert failed.problem is not None
        assert failed.problem.startswith("NotFiniteError")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    (right,) = driver.executor.recheck(WAIT_S)
    assert right.is_right
    video = request("v")
    driver.next(TaskDone, driver.chunk(video, driver.begin(video), []))


def test_a_group_that_reaches_no_step_boundary_is_told(model: HeliosModel) -> None:
    driver = Driver(model, Fault(point="dit.step", action="sleep", seconds=1.5))
    driver.start()
    try:
        video = request("v")
        task_id = driver.chunk(video, driver.begin(video), [])
        while not driver.executor._dit._runner.active:
            pass
        (check,) = driver.executor.recheck(0.2)
        assert check.problem == "TimeoutError: no step boundary within 0.2 s, or the worker ends"
        driver.next(TaskDone, task_id)
        (later,) = driver.executor.recheck(WAIT_S)
        assert later.is_right
    finally:
        driver.executor.close(10)


def test_a_worker_that_ends_keeps_nobody_waiting(driver: Driver) -> None:
    driver.executor.close(10)
    (check,) = driver.executor.recheck(WAIT_S)
    assert not check.is_right


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.xdist_group("ray")
def test_every_rank_of_every_group_of_a_cluster_makes_it(tiny_distilled: Path) -> None:
    pytest.importorskip("ray")
    from helios_serve.workers.ray_executor import RayExecutor
    from tests.workers.ray_driver import Driver as RayDriver

    config = ExecutorConfig(num_dit_groups=2, num_dit_ranks=2, cpus_per_vae=1, object_store_bytes=256 << 20)
    executor = RayExecutor(ModelConfig(model=str(tiny_distilled)), config, exit_process=lambda _: None)
    driver = RayDriver(executor)
    try:
        waiting = {"encoder-0", "vae-0", "dit-0", "dit-1"}
        golden: dict[str, str | None] = {}
        while waiting:
            up = driver.hear(GroupUp)
            waiting.discard(up.group)
            golden[up.group] = up.golden
        for _ in range(2):
            checks = {check.group: check for check in executor.recheck(WAIT_S)}
            assert {*checks} == {"dit-0", "dit-1"}
            assert all(check.is_right and check.expected == golden[name] for name, check in checks.items()), checks
    finally:
        executor.close(20)
    assert executor.recheck(1.0) == ()
