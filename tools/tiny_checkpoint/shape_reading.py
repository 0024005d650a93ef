"""How clearly decoded pictures show which shape they mean: the scorer's reading of shapes, made smooth to learn from.

A pixel's mean error hardly tells a square from a circle of its area, which differ in the corners alone; this loss is
about nothing else, and near zero where the shape can be read. Knows pixels and where things are; knows no model.
Shape letters: B examples, F frames, H x W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tools.tiny_checkpoint.captions import VALUES
from tools.tiny_checkpoint.render import wrapped
from tools.tiny_checkpoint.world import COLOURS, HEIGHT, SHAPES, SIZES, WIDTH

_STEEPNESS = 8.0
"""Of the step from background to thing, along the line between their colours."""
_SHARPNESS = 20.0
"""Of the choice between outlines by their overlap: those of a circle and of a square of one area overlap by 0.83."""
_AREAS = (math.pi, 1.8**2, 2.0)
"""Of each of SHAPES as `render` draws it, in squares of half its diameter."""
_CENTROIDS = (0.0, 0.0, 1 / 3)
"""How far below the middle of what is drawn, in half diameters."""
_BACKGROUND, _COLOUR, _SHAPE, _SIZE = (tuple(VALUES).index(name) for name in ("background", "colour", "shape", "size"))


def shape_loss(decoded: Tensor, is_seen: Tensor, attributes: Tensor, centres: Tensor, corners: Tensor) -> Tensor:
    """Cross-entropy of the shape that each example shows, the mean over them.

    Args:
        decoded: [B, 3, F, H, W] in [-1, 1].
        is_seen: [B, 1, F, H, W] bool, whether a pixel counts.
        attributes: [B, attributes], what the thing is, by its place among VALUES.
        centres: [B, F, 2], of what is drawn, x and y in pixels of the world.
        corners: [B, 2], x and y of the upper left pixel of each picture.
    """
    palette = torch.tensor(list(COLOURS.values()), device=decoded.device) / 127.5 - 1
    ground, colour = (palette[attributes[:, index]][:, :, None, None, None] for index in (_BACKGROUND, _COLOUR))
    line = colour - ground
    along = ((decoded - ground) * line).sum(1) / line.square().sum(1)  # (B, F, H, W): 0 is the background, 1 the thing
    mask = torch.sigmoid(_STEEPNESS * (along - 0.5)) * is_seen[:, 0]
    outlines = _outlines(decoded.shape[-2:], attributes, centres, corners) * is_seen  # (B, shapes, F, H, W)
    shared = (mask[:, None] * outlines).sum((2, 3, 4))
    either = mask.sum((1, 2, 3))[:, None] + outlines.sum((2, 3, 4)) - shared
    return F.cross_entropy(_SHARPNESS * shared / either.clamp(min=1.0), attributes[:, _SHAPE])


def _outlines(size: tuple[int, ...], attributes: Tensor, centres: Tensor, corners: Tensor) -> Tensor:
    """A circle, a square and a triangle of the thing's area around its centroid, [B, shapes, F, H, W]."""
    device, (height, width) = centres.device, size
    shape = attributes[:, _SHAPE]
    radius = torch.tensor([SIZES[name] / 2 for name in VALUES["size"]], device=device)[attributes[:, _SIZE]]
    area = (torch.tensor(_AREAS, device=device)[shape] * radius.square())[:, None, None, None]
    below = (torch.tensor(_CENTROIDS, device=device)[shape] * radius)[:, None]
    across = torch.arange(width, device=device) + 0.5 + corners[:, :1]  # (B, W)
    down = torch.arange(height, device=device) + 0.5 + corners[:, 1:]  # (B, H)
    x = wrapped(across[:, None] - centres[..., :1], WIDTH)[:, :, None, :]  # (B, F, 1, W)
    y = wrapped(down[:, None] - (centres[..., 1] + below)[..., None], HEIGHT)[..., None]  # (B, F, H, 1)
    base = (2 * area).sqrt()  # of a triangle as high as it is wide
    outlines = {
        "circle": x.square() + y.square() <= area / math.pi,
        "square": torch.maximum(x.abs(), y.abs()) <= area.sqrt() / 2,
        "triangle": (y <= base / 3) & (x.abs() <= (y + 2 * base / 3) / 2),
    }
    return torch.stack([outlines[name] for name in SHAPES], dim=1).float()
