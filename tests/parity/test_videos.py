"""Whole videos against diffusers in float32 on the CPU: every variant, task and option that changes pixels."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from helios_serve.offline import Helios
from tests.parity.oracle import Case, Oracle, assert_same_video, run_ours

MakeCheckpoint = Callable[..., Path]

GUIDED = {"guidance_scale": 5.0, "negative_prompt": "blurry, dark"}


def _matrix() -> list[Case]:
    """Variant x task x (size, seed, chunks), guidance on where the variant is made for it."""
    cases = []
    shapes = {
        "base": [((48, 32), 0, 33), ((80, 48), 1, 66), ((32, 64), 7, 99)],
        "mid": [((128, 64), 0, 33), ((128, 128), 1, 40), ((128, 64), 7, 99)],
        "distilled": [((64, 64), 0, 33), ((128, 64), 1, 66), ((64, 128), 7, 70)],
    }
    steps = {"base": (4,), "mid": (3, 2, 2), "distilled": (2, 2, 2)}
    for variant, task in itertools.product(shapes, ("t2v", "i2v", "v2v")):
        for size, seed, num_frames in shapes[variant]:
            case = Case(variant, task, size, seed, num_frames, steps[variant])
            if variant == "distilled":
                cases.append(_with(case, amplify_first_chunk=True))
            else:
                cases.append(_with(case, **GUIDED, use_zero_init=variant == "mid"))
    return cases


def _options() -> list[Case]:
    """One option at a time, and the combinations that interact."""
    base = Case("base", size=(48, 32), steps=(3,))
    mid = Case("mid", size=(128, 64), steps=(2, 2, 1))
    distilled = Case("distilled", size=(64, 64), steps=(2, 1, 2))
    return [
        base,
        _with(base, steps=(1,)),
        _with(base, steps=(12,), num_frames=34),
        _with(base, guidance_scale=5.0),
        _with(base, guidance_scale=1.5, negative_prompt="x"),
        _with(base, num_frames=99, skip_first_chunk=True),
        _with(base, task="i2v", num_frames=99, skip_first_chunk=True, guidance_scale=3.0),
        _with(base, task="i2v", image_sigmas=(0.0, 0.0), video_sigmas=(0.5, 0.9)),
        _with(base, task="v2v", image_sigmas=(0.3, 0.4), video_sigmas=(0.0, 1.0)),
        _with(base, task="v2v", video_frames=33),
        _with(base, task="v2v", video_frames=165, num_frames=40),
        _with(base, prompt=""),
        _with(base, prompt="a very long prompt " * 200),
        _with(base, num_frames=1),
        _with(mid, steps=(1, 1, 1)),
        _with(mid, **GUIDED),
        _with(mid, **GUIDED, use_zero_init=True),
        _with(mid, **GUIDED, use_zero_init=True, zero_steps=0),
        _with(mid, **GUIDED, use_zero_init=True, zero_steps=5, steps=(3, 2, 2)),
        _with(mid, use_zero_init=True),
        _with(mid, **GUIDED, num_frames=99, skip_first_chunk=True),
        _with(mid, task="i2v", image_sigmas=(0.2, 0.6), video_sigmas=(0.1, 0.1)),
        _with(mid, task="v2v", video_frames=100, guidance_scale=2.0),
        _with(mid, size=(64, 64)),
        _with(distilled, steps=(1, 1, 1)),
        _with(distilled, steps=(1, 1, 1), amplify_first_chunk=True, num_frames=66),
        _with(distilled, guidance_scale=5.0),
        _with(distilled, **GUIDED, amplify_first_chunk=True, task="i2v"),
        _with(distilled, num_frames=99, skip_first_chunk=True, amplify_first_chunk=True),
        _with(distilled, task="v2v", video_frames=66, num_frames=99, skip_first_chunk=True),
        _with(distilled, steps=(4, 3, 5)),
        _with(distilled, size=(192, 64)),
    ]


def _checkpoints() -> list[Case]:
    """Amplified history, and schedulers set up otherwise than the official ones."""
    return [
        Case("base+amplify", size=(48, 32), steps=(3,), num_frames=66, **GUIDED),
        Case("mid+amplify", size=(128, 64), steps=(2, 1, 1), num_frames=66, **GUIDED, use_zero_init=True),
        Case("distilled+amplify", size=(64, 64), steps=(1, 1, 1), num_frames=66, amplify_first_chunk=True),
        Case("distilled+amplify", "i2v", size=(64, 64), steps=(2, 1, 1)),
        Case("base+euler", size=(48, 32), steps=(4,), guidance_scale=3.0),
        Case("base+linear", size=(48, 32), steps=(3,)),
        Case("base+static", size=(48, 32), steps=(3,)),
        Case("mid+euler", size=(128, 64), steps=(2, 2, 2), **GUIDED),
        Case("mid+linear", size=(128, 64), steps=(2, 2, 2)),
        Case("mid+static", size=(128, 64), steps=(2, 2, 2)),
        Case("mid+plain-cfg", size=(128, 64), steps=(2, 1, 1), **GUIDED, use_zero_init=True),
        Case("distilled+exponential", size=(64, 64), steps=(2, 2, 2), amplify_first_chunk=True),
        Case("distilled+static", size=(64, 64), steps=(2, 2, 2)),
        Case("distilled+zero-star", size=(128, 64), steps=(2, 1, 1), **GUIDED, use_zero_init=True),
        Case("distilled+two-stages", size=(64, 64), steps=(2, 2)),
    ]


SCHEDULER_EDITS = {
    "euler": {"scheduler_type": "euler"},
    "linear": {"time_shift_type": "linear"},
    "exponential": {"time_shift_type": "exponential"},
    "static": {"use_dynamic_shifting": False},
    "two-stages": {"stages": 2, "stage_range": [0, 0.5, 1]},
}
INDEX_EDITS = {"plain-cfg": {"is_cfg_zero_star": False}, "zero-star": {"is_cfg_zero_star": True}}


def edited_checkpoint(name: str, make_checkpoint: MakeCheckpoint, folders: pytest.TempPathFactory) -> Path:
    """The checkpoint of a case: a variant, with amplified history or one edited configuration behind the plus."""
    variant, _, edit = name.partition("+")
    made = make_checkpoint(variant, amplify_history=edit == "amplify")
    if edit in ("", "amplify"):
        return made
    path = folders.mktemp("edited") / name
    shutil.copytree(made, path)
    _edit(path / "scheduler" / "scheduler_config.json", SCHEDULER_EDITS.get(edit, {}))
    _edit(path / "model_index.json", INDEX_EDITS.get(edit, {}))
    return path


def _edit(file: Path, changes: dict[str, object]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _with(case: Case, **changes: object) -> Case:
    return Case(**{**{name: getattr(case, name) for name in case.__dataclass_fields__}, **changes})


def _strongly_guided() -> list[Case]:
    """Guidance and the chunks multiply a rounding by a thousand: sums must keep the reference's order."""
    mid = Case("mid+amplify", size=(128, 64), steps=(3, 3, 3), seed=1, num_frames=99, use_zero_init=True)
    return [
        _with(mid, task="v2v", guidance_scale=7.5, video_frames=70),
        _with(mid, task="i2v", guidance_scale=12.0),
        _with(mid, guidance_scale=20.0),
    ]


CASES = [*_matrix(), *_options(), *_checkpoints(), *_strongly_guided()]


@pytest.fixture(scope="session")
def models(
    make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Oracle, Helios]]:
    """Both engines on one checkpoint, by its name in a case."""

    @cache
    def load(name: str) -> tuple[Oracle, Helios]:
        path = edited_checkpoint(name, make_checkpoint, tmp_path_factory)
        return Oracle(path), Helios(path)

    return load


@pytest.mark.parametrize("case", CASES, ids=str)
def test_video_equals_diffusers(case: Case, models: Callable[[str], tuple[Oracle, Helios]]) -> None:
    oracle, helios = models(case.checkpoint)
    assert_same_video(run_ours(helios, case), oracle.run(case))


def test_a_stage_one_token_wide_with_guidance_is_served(
    models: Callable[[str], tuple[Oracle, Helios]],
) -> None:
    """The reference fails there, on the memory layout of its flows alone; ours makes the video that it would make."""
    case = Case("mid", size=(64, 64), steps=(2, 1, 1), **GUIDED, use_zero_init=True, num_frames=40)
    oracle, helios = models("mid")
    with pytest.raises(RuntimeError, match="view"):
        oracle.run(case)
    with oracle.contiguous_flows():
        assert_same_video(run_ours(helios, case), oracle.run(case))


def test_there_are_enough_cases() -> None:
    assert len(CASES) == len(set(CASES)) >= 60
