"""The scorer reads drawn clips right, and does not when it is shown something else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tools.tiny_checkpoint.evaluate import true_frames
from tools.tiny_checkpoint.scorer import Frames, mean_colours, read_frames
from tools.tiny_checkpoint.world import COLOURS, DIRECTIONS, SPEEDS, Scene, Thing, draw_scene

NUM_CLIPS = 24
RED_CIRCLE = Scene(
    things=(Thing(colour="red", shape="circle", size="large", direction="left", speed="fast"),), background="white"
)


def test_drawn_clips_are_read_right() -> None:
    rng, wrong = random.Random(0), []
    for index in range(NUM_CLIPS):
        scene = draw_scene(rng, held_back=index % 2 == 0)
        reading, told = read_frames(_spoiled(true_frames(scene, index)[::2], index)), scene.attributes
        seen = {
            "colour": reading.colour,
            "shape": reading.shape,
            "direction": reading.direction,
            "background": reading.background,
        }
        wrong += [(scene, seen)] if any(told[name] != value for name, value in seen.items()) else []
        assert reading.speed == pytest.approx(2 * SPEEDS[told["speed"]], rel=0.1)
    assert wrong == []


def _spoiled(frames: Frames, seed: int) -> Frames:
    """With noise and a little blur, as decoded frames have."""
    blurred = np.mean([np.roll(frames, shift, 2) for shift in (-1, 0, 1)], axis=0, dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(frames.shape, np.float32)
    return (blurred + 8 * noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("direction", sorted(DIRECTIONS))
def test_reversed_clips_move_the_other_way(direction: str) -> None:
    thing = replace(RED_CIRCLE.things[0], direction=direction)
    frames = true_frames(replace(RED_CIRCLE, things=(thing,)), 1)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert read_frames(frames[::-1]).direction == opposite[direction]


def test_still_frames_have_no_direction() -> None:
    frames = np.repeat(true_frames(RED_CIRCLE, 0)[:1], 33, axis=0)
    reading = read_frames(frames)
    assert (reading.colour, reading.shape, reading.direction) == ("red", "circle", None)


@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_an_empty_picture_shows_nothing(colour: str) -> None:
    frames = np.broadcast_to(np.array(COLOURS[colour], np.uint8), (16, 64, 128, 3))
    reading = read_frames(frames)
    assert (reading.background, reading.colour, reading.shape) == (colour, None, None)


def test_noise_is_not_what_was_asked_for() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(5):
        reading = read_frames(rng.integers(0, 256, (9, 64, 128, 3), dtype=np.uint8))
        hits += (reading.colour, reading.shape, reading.direction) == ("red", "circle", "left")
    assert hits == 0


def test_mean_colours_are_those_that_were_drawn() -> None:
    ground, shape = mean_colours(true_frames(RED_CIRCLE, 0))
    assert np.abs(ground - COLOURS["white"]).max() < 3
    assert np.abs(shape - COLOURS["red"]).max() < 12
