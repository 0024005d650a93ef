"""Every task of the suite runs on a checkpoint and is scored by what its videos show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helios_serve.offline import Helios
from tools.tiny_checkpoint import evaluate
from tools.tiny_checkpoint.evaluate import TASKS, Outcome, contact_sheet, held_back_cases, shares, true_frames


@pytest.fixture(scope="module")
def helios(barely_trained: Path) -> Helios:
    return Helios(barely_trained)


@pytest.mark.parametrize(("task", "num_frames"), [("text", 66), ("image", 66), ("video", 66), ("change", 132)])
def test_a_task_makes_a_video_and_scores_it(helios: Helios, task: str, num_frames: int) -> None:
    (outcome,) = evaluate.evaluate(helios, task, 1)
    assert outcome.frames.shape == (num_frames, 64, 128, 3)
    assert tuple(outcome.held) == TASKS[task][1]


def test_long_videos_are_measured_for_drift(helios: Helios, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LONG_CHUNKS", 2)
    measured = shares(evaluate.evaluate(helios, "long", 1))
    assert {"colour_drift", "brightness_drift", "speed_at_end"} < measured.keys()


def test_true_videos_pass_and_others_do_not() -> None:
    cases = [*held_back_cases(6, ("colour", "shape", "direction"))]
    right = [_outcome(case_index, case_index, cases) for case_index in range(6)]
    wrong = [_outcome(case_index, (case_index + 1) % 6, cases) for case_index in range(6)]
    assert set(shares(right).values()) == {1.0}
    assert max(shares(wrong).values()) < 0.7
    assert contact_sheet(right).size == (8 * 130, 6 * 66)


def _outcome(asked: int, shown: int, cases: list[evaluate.Case]) -> Outcome:
    frames = true_frames(cases[shown].scene, cases[shown].seed)
    return evaluate._outcome(cases[asked], frames, frames)


def test_held_back_prompts_are_always_the_same() -> None:
    first, again = ([case.scene for case in held_back_cases(20, ())] for _ in range(2))
    assert first == again
    assert all(scene.is_held_back for scene in first)
    assert len(set(first)) > 15
    assert not np.array_equal(true_frames(first[0], 0), true_frames(first[0], 1))
