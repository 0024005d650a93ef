"""Approximations by name: in the settings, and where each one is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helios_serve.config import ModelConfig
from helios_serve.errors import CheckpointError
from helios_serve.model_executor.approximations import check_approximations
from helios_serve.model_executor.model import load_model, open_checkpoint
from helios_serve.model_executor.model_config import Solver
from helios_serve.parallel.collectives import Axis
from helios_serve.parallel.mesh import SOLO
from helios_serve.settings import SettingsError, load_settings
from helios_serve.types import Approximation
from tests.model_executor.test_runner import Bench, request

HISTORY: tuple[Approximation, ...] = ("history_reuse",)
STEPS: tuple[Approximation, ...] = ("step_cache",)
BOTH = HISTORY + STEPS


def test_settings_name_them() -> None:
    settings = load_settings(
        None, {"HELIOS_MODEL_MODEL": "m", "HELIOS_MODEL_APPROXIMATIONS": "history_reuse, step_cache"}
    )
    assert settings.model.approximations == BOTH
    assert load_settings(None, {"HELIOS_MODEL_MODEL": "m"}).model.approximations == ()


@pytest.mark.parametrize("given", ["teacache", "history_reuse,teacache", "history reuse"])
def test_settings_refuse_what_is_none_and_say_what_there_is(given: str) -> None:
    with pytest.raises(SettingsError, match="history_reuse or step_cache"):
        load_settings(None, {"HELIOS_MODEL_MODEL": "m", "HELIOS_MODEL_APPROXIMATIONS": given})


def test_the_code_refuses_them_too() -> None:
    with pytest.raises(ValueError, match="approximations teacache: there are history_reuse and step_cache"):
        ModelConfig(model="m", approximations=("teacache",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each one once"):
        ModelConfig(model="m", approximations=("step_cache", "step_cache"))
    with pytest.raises(ValueError, match=r"step_cache_threshold -0\.1"):
        ModelConfig(model="m", step_cache_threshold=-0.1)


@pytest.mark.parametrize("solver", ["unipc", "euler", "dmd"])
def test_history_reuse_goes_with_every_solver_and_with_sharded_tokens(solver: Solver) -> None:
    check_approximations(HISTORY, solver, num_ranks=8)
    with pytest.raises(CheckpointError, match="cfg degree of 2"):
        check_approximations(HISTORY, solver, num_ranks=8, cfg_degree=2)


def test_step_cache_is_for_many_steps_on_one_rank() -> None:
    check_approximations(STEPS, "unipc")
    with pytest.raises(CheckpointError, match="not on 2"):
        check_approximations(STEPS, "unipc", num_ranks=2)
    with pytest.raises(CheckpointError, match="Base and Mid"):
        check_approximations(STEPS, "dmd")
    check_approximations((), "dmd", num_ranks=8, cfg_degree=2)


def test_a_checkpoint_that_cannot_is_refused_before_it_is_loaded(tiny_distilled: Path, tiny_mid: Path) -> None:
    with pytest.raises(CheckpointError, match="Base and Mid") as refused:
        open_checkpoint(ModelConfig(model=str(tiny_distilled), approximations=BOTH))
    assert refused.value.param == "approximations"
    opened = open_checkpoint(ModelConfig(model=str(tiny_mid), approximations=BOTH, step_cache_threshold=0.2))
    assert opened.rules.step_cache_threshold == 0.2


def test_a_video_that_was_accepted_elsewhere_is_refused_before_its_first_step(tiny_distilled: Path) -> None:
    """By all ranks alike, as none of them has begun to wait for the others."""
    bench = Bench(load_model(ModelConfig(model=str(tiny_distilled))))
    video = request("fox")
    with pytest.raises(CheckpointError, match="Base and Mid"):
        bench.begin(replace(video, params=replace(video.params, approximations=STEPS)))
    bench.runner._mesh = replace(SOLO, cfg=Axis(ranks=(0, 1)))
    with pytest.raises(CheckpointError, match="cfg degree of 2"):
        bench.begin(replace(video, params=replace(video.params, approximations=HISTORY)))
    assert bench.runner.active == ()
