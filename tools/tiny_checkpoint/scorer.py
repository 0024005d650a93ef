"""Reads off decoded frames what they show: colour, shape, direction, speed and background of one moving shape.

Plain image processing, nothing learned: the nearest colours of the palette, the overlap with drawn outlines, and how
far the centre moves on a picture whose borders meet. Knows pixels; knows no prompts and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tools.tiny_checkpoint.world import COLOURS, SHAPES

Frames = npt.NDArray[np.uint8]
"""[F, H, W, 3] RGB."""
Mask = npt.NDArray[np.bool_]

_MIN_CONTRAST = 50.0
"""RGB distance from the background of a pixel that belongs to a shape."""
_MIN_AREA = 40
"""Pixels of a shape in a frame; below, it has none."""
_LAG_FRAMES = 8
"""Motion is measured over so many frames."""
_MIN_SPEED = 0.1
_SHAPE_EVERY_FRAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What frames show; None for what cannot be seen. speed in pixels per frame."""

    background: str
    colour: str | None
    shape: str | None
    direction: str | None
    speed: float


def read_frames(frames: Frames) -> Reading:
    """The reading of frames [F, H, W, 3], all of which are taken to show one scene with one shape."""
    pixels = frames.astype(np.float32)
    names = tuple(COLOURS)
    nearest = _nearest_colour(pixels)
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    background = int(counts.argmax())
    ground = np.median(pixels[nearest == background], axis=0)
    is_other = np.linalg.norm(pixels - ground, axis=-1) > _MIN_CONTRAST
    others = np.bincount(nearest[is_other & (nearest != background)].ravel(), minlength=len(names))
    if others.max() < _MIN_AREA * len(frames) / 2:
        return Reading(background=names[background], colour=None, shape=None, direction=None, speed=0.0)
    colour = int(others.argmax())
    masks = _masks(pixels, ground, np.median(pixels[is_other & (nearest == colour)], axis=0))
    direction, speed = _motion(masks)
    return Reading(
        background=names[background], colour=names[colour], shape=_shape(masks), direction=direction, speed=speed
    )


def mean_colours(frames: Frames) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean RGB of the background and of the shape, 0 to 255; NaN for a shape that is not there."""
    pixels = frames.astype(np.float32)
    nearest = _nearest_colour(pixels)
    background = int(np.bincount(nearest.ravel()).argmax())
    is_ground = nearest == background
    far = np.linalg.norm(pixels - pixels[is_ground].mean(axis=0), axis=-1) > 2 * _MIN_CONTRAST
    shape = pixels[far].mean(axis=0) if far.any() else np.full(3, np.nan, np.float32)
    return pixels[is_ground].mean(axis=0), shape


def _nearest_colour(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    palette = np.array(list(COLOURS.values()), np.float32)
    # |pixel - colour|^2 without |pixel|^2, which is the same for all colours
    nearest: npt.NDArray[np.intp] = (np.square(palette).sum(-1) - 2 * pixels @ palette.T).argmin(-1)
    return nearest


def _masks(pixels: npt.NDArray[np.float32], ground: npt.NDArray[np.float32], colour: npt.NDArray[np.float32]) -> Mask:
    """Pixels nearer to the shape's colour than to the background's, along the line between both: [F, H, W]."""
    line = colour - ground
    masks: Mask = (pixels - ground) @ line / (line @ line) > 0.5
    return masks


def _motion(masks: Mask) -> tuple[str | None, float]:
    """The main direction and the speed along it, by the median over the clip."""
    centres = [_centre(mask) for mask in masks]
    pairs = zip(centres, centres[_LAG_FRAMES:], strict=False)
    size = masks.shape[2], masks.shape[1]
    steps = [_wrapped(np.subtract(new, old), size) for old, new in pairs if old is not None and new is not None]
    if not steps:
        return None, 0.0
    x, y = np.median(steps, axis=0) / _LAG_FRAMES
    speed = float(max(abs(x), abs(y)))
    if speed < _MIN_SPEED:
        return None, speed
    if abs(x) >= abs(y):
        return ("right" if x > 0 else "left"), speed
    return ("down" if y > 0 else "up"), speed


def _centre(mask: Mask) -> tuple[float, float] | None:
    """Centre of the mask along x and y, on a picture whose opposite borders meet."""
    if mask.sum() < _MIN_AREA:
        return None
    return _circular_mean(mask.sum(0)), _circular_mean(mask.sum(1))


def _circular_mean(weights: npt.NDArray[np.int_]) -> float:
    turns = np.exp(2j * np.pi * (np.arange(len(weights)) + 0.5) / len(weights))
    return float(np.angle((weights * turns).sum()) / (2 * np.pi) % 1 * len(weights))


def _wrapped(offset: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    half = np.array(size) / 2
    return (offset + half) % (2 * half) - half


def _shape(masks: Mask) -> str | None:
    """The outline of equal area that overlaps best, over the clip."""
    scores = [_overlaps(mask) for mask in masks[::_SHAPE_EVERY_FRAMES] if mask.sum() >= _MIN_AREA]
    return SHAPES[int(np.mean(scores, axis=0).argmax())] if scores else None


def _overlaps(mask: Mask) -> Sequence[float]:
    """Intersection over union with a circle, a square and a triangle of the mask's area around its centroid."""
    centre = _centre(mask)
    assert centre is not None
    height, width = mask.shape
    shift = (round(height / 2 - centre[1]), round(width / 2 - centre[0]))
    rolled = np.roll(mask, shift, (0, 1))
    rows, columns = np.nonzero(rolled)
    y = np.arange(height)[:, None] - rows.mean()
    x = np.arange(width)[None] - columns.mean()
    area = len(rows)
    base = np.sqrt(2 * area)  # of a triangle as high as it is wide, whose centroid is a third above its base
    outlines = (
        x**2 + y**2 <= area / np.pi,
        np.maximum(abs(x), abs(y)) <= np.sqrt(area) / 2,
        (y <= base / 3) & (abs(x) <= (y + 2 * base / 3) / 2),
    )
    return [float((rolled & outline).sum() / (rolled | outline).sum()) for outline in outlines]
