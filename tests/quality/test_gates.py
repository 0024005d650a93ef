"""The shipped checkpoint follows prompts that it never saw, and does not drift."""

from __future__ import annotations

import pytest

from helios_serve.config import EMBEDDED_MODEL
from helios_serve.offline import Helios
from tools.tiny_checkpoint.evaluate import evaluate, shares
from tools.tiny_checkpoint.export import MAX_BYTES

GATES = {
    "text": {"colour": 0.90, "shape": 0.70, "direction": 0.70},
    "image": {"colour": 0.80, "shape": 0.80},
    "video": {"direction": 0.65},
    "change": {"colour": 0.75},
}
MAX_DRIFT = 0.05
MIN_SPEED = 0.1
"""Pixels per frame: slower is a freeze."""


@pytest.fixture(scope="module")
def helios() -> Helios:
    return Helios(EMBEDDED_MODEL)


def test_a_few_prompts_are_followed(helios: Helios) -> None:
    """Two of five may fail in one respect; 100 prompts tell more, in the tests below."""
    measured = shares(evaluate(helios, "text", 5))
    assert measured["colour"] >= 0.6
    assert measured["shape"] >= 0.4
    assert measured["direction"] >= 0.4


@pytest.mark.quality
@pytest.mark.parametrize("task", sorted(GATES))
def test_held_back_prompts_are_followed(helios: Helios, task: str) -> None:
    measured = shares(evaluate(helios, task, 100))
    print(task, measured)
    missed = {name: measured[name] for name, gate in GATES[task].items() if measured[name] < gate}
    assert missed == {}, measured


@pytest.mark.quality
def test_twenty_chunks_neither_drift_nor_freeze(helios: Helios) -> None:
    measured = shares(evaluate(helios, "long", 3))
    print("long", measured)
    assert measured["colour_drift"] < MAX_DRIFT
    assert measured["brightness_drift"] < MAX_DRIFT
    assert measured["speed_at_end"] > MIN_SPEED


def test_the_files_are_small() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.rglob("*") if file.is_file()) <= MAX_BYTES
