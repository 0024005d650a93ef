"""Draws scenes as frames, a batch at a time, on any device. Knows pixels; knows no words and no model.

Shape letters: B scenes, S things, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_serve.types import FRAMES_PER_CHUNK
from tools.tiny_checkpoint.world import COLOURS, HEIGHT, MAX_THINGS, SHAPES, SIZES, WIDTH, Clip, Scene

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """What is seen of the world: `height` x `width` pixels whose corner is at `left`, `top`, [B] each, for each scene.

    The world goes on beyond its borders from the other side.
    """

    left: Tensor
    top: Tensor
    width: int = WIDTH
    height: int = HEIGHT


def render(scenes: Sequence[Scene], centres: Tensor, num_frames: int, canvas: Canvas) -> Tensor:
    """Frames of scenes.

    Args:
        scenes: B of them.
        centres: [B, S, 2] in pixels, x and y of the things in frame 0; unused ones are ignored.

    Returns: [B, 3, F, H, W] float32 in [-1, 1], edges softened over one pixel.
    """
    device = centres.device
    time = torch.arange(num_frames, device=device)
    across = torch.arange(canvas.width, device=device) + 0.5 + canvas.left[:, None]  # (B, W)
    along = torch.arange(canvas.height, device=device) + 0.5 + canvas.top[:, None]  # (B, H)
    frames = _palette(device)[_codes(scenes, 0)[0].to(device)]  # (B, 3)
    frames = frames[:, :, None, None, None].expand(-1, -1, num_frames, canvas.height, canvas.width)
    for index in reversed(range(max(len(scene.things) for scene in scenes))):
        _, colour, shape, diameter, velocity = (code.to(device) for code in _codes(scenes, index))
        at = centres[:, None, index] + velocity[:, None] * time[:, None]  # (B, F, 2)
        x = wrapped(across[:, None] - at[..., :1], WIDTH)[:, :, None, :]  # (B, F, 1, W)
        y = wrapped(along[:, None] - at[..., 1:], HEIGHT)[:, :, :, None]  # (B, F, H, 1)
        cover = _cover(shape, diameter, x, y)[:, None]
        frames = torch.lerp(frames, _palette(device)[colour][:, :, None, None, None], cover)
    return frames.contiguous()


def render_chunks(
    clips: Sequence[Clip], chunk: int, num_frames: int = FRAMES_PER_CHUNK, device: torch.device = _CPU
) -> Tensor:
    """The same chunk of several clips in full size: [B, 3, F, H, W] on `device`."""
    centres = torch.zeros(len(clips), MAX_THINGS, 2)
    for row, clip in zip(centres, clips, strict=True):
        row[: len(clip.starts)] = torch.tensor(clip.centres(chunk))
    corner = torch.zeros(len(clips), device=device)
    return render(
        [clip.scenes[chunk] for clip in clips], centres.to(device), num_frames, Canvas(left=corner, top=corner)
    )


def _palette(device: torch.device) -> Tensor:
    """[colours, 3] in [-1, 1]."""
    return torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1


def _codes(scenes: Sequence[Scene], index: int) -> tuple[Tensor, ...]:
    """Background, and of the thing of that index colour, shape, diameter [B] and velocity [B, 2]; 0 for none."""
    names, rows = tuple(COLOURS), []
    for scene in scenes:
        background = names.index(scene.background)
        if index >= len(scene.things):
            rows.append((background, 0, 0, 0, (0.0, 0.0)))
            continue
        thing = scene.things[index]
        shape, diameter = SHAPES.index(thing.shape), SIZES[thing.size]
        rows.append((background, names.index(thing.colour), shape, diameter, thing.velocity))
    return tuple(torch.tensor(column) for column in zip(*rows, strict=True))


def wrapped(offset: Tensor, length: int) -> Tensor:
    """The shortest way around: into [-length / 2, length / 2)."""
    return (offset + length / 2) % length - length / 2


def _cover(shape: Tensor, diameter: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel the shape covers: [B, F, H, W] in [0, 1], from the signed distance to its border."""
    radius = (diameter / 2)[:, None, None, None]
    circle = radius - (x.square() + y.square()).sqrt()
    square = 0.9 * radius - torch.maximum(x.abs(), y.abs())
    slope = 0.8944  # of a side that rises two pixels for one: 2 / sqrt(5)
    triangle = torch.minimum(radius - y, ((y + radius) / 2 - x.abs()) * slope)
    kind = shape[:, None, None, None]
    inside = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return torch.where(radius > 0, (inside + 0.5).clamp(0, 1), 0.0)
