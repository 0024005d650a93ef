"""The scheduler's decision and the cost model under pytest-benchmark, for working on one of them.

    pytest benchmarks/scheduler.py

CPU of one core. What the scheduler decides, and whether that is right, is `scheduler_sim`'s.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scheduler_sim import crowd
from helios_serve.engine.fairness import AgeCredit
from helios_serve.engine.request_state import GroupState, RequestState
from helios_serve.engine.scheduler import SchedulerConfig, next_wake, plan
from helios_serve.engine.step_cost import CostModel, DevicePrior, ModelShape, StepSample

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

NOW = 110.0
"""Just behind the moment that `crowd` stands at."""


@pytest.mark.parametrize("num_jobs", [64, 1000])
@pytest.mark.parametrize("num_idle", [0, 1, 64])
def test_plan(benchmark: Any, num_jobs: int, num_idle: int) -> None:
    """Each round begins from a fresh crowd, as a plan changes what it is given."""
    config = SchedulerConfig()

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        jobs, groups, model = crowd(num_jobs, 64, num_idle)
        return (NOW, jobs, groups, model, config, AgeCredit()), {}

    benchmark.pedantic(plan, setup=fresh, rounds=30)


@pytest.fixture(scope="module")
def settled() -> tuple[list[RequestState], list[GroupState], CostModel]:
    """A thousand jobs for which no group is free."""
    return crowd(1000, 64, 0)


def test_next_wake(benchmark: Any, settled: tuple[list[RequestState], list[GroupState], CostModel]) -> None:
    benchmark(next_wake, NOW, settled[0], SchedulerConfig())


def test_predict_a_pack(benchmark: Any, settled: tuple[list[RequestState], list[GroupState], CostModel]) -> None:
    jobs, _, model = settled
    benchmark(model.forward_s, 4, tuple(job.step_shape for job in jobs[:8]))


def test_learn_from_a_step(benchmark: Any, settled: tuple[list[RequestState], list[GroupState], CostModel]) -> None:
    model = CostModel(ModelShape(), DevicePrior())
    sample = StepSample(num_ranks=4, steps=(settled[0][0].step_shape,), seconds=0.06, steps_since_load=100)
    benchmark(model.observe, sample)
