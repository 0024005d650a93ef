"""Which pairs of width and height a checkpoint allows, and the nearest ones to a pair that it does not."""

from __future__ import annotations

import math

from helios_serve.errors import InvalidRequestError
from helios_serve.types import ModelInfo


def check_size(width: int, height: int, model: ModelInfo, param: str) -> None:
    """Raises InvalidRequestError, naming at most two valid sizes, unless `model` can make `width` x `height`."""
    if is_valid_size(width, height, model):
        return
    if width < 1 or height < 1 or width % model.size_multiple or height % model.size_multiple:
        problem = f"both sides must be multiples of {model.size_multiple} for {model.name}"
    else:
        problem = f"at most {model.max_pixels} pixels on this server"
    nearest = ", ".join(f"{w}x{h}" for w, h in nearest_sizes(width, height, model))
    raise InvalidRequestError(f"size {width}x{height}: {problem}; nearest: {nearest}", param=param)


def is_valid_size(width: int, height: int, model: ModelInfo) -> bool:
    """Whether `model` can make `width` x `height`."""
    is_whole = width % model.size_multiple == height % model.size_multiple == 0
    return min(width, height) > 0 and is_whole and width * height <= model.max_pixels


def nearest_sizes(width: int, height: int, model: ModelInfo) -> list[tuple[int, int]]:
    """At most two valid (width, height) pairs, the one with the nearest aspect ratio first; never empty.

    Scales the pair down to fit `max_pixels`, then rounds each side down and up to the checkpoint's multiple.
    """
    multiple = model.size_multiple
    width, height = max(1, width), max(1, height)
    scale = min(1.0, math.sqrt(model.max_pixels / (width * height)))
    candidates = {
        (w, h)
        for w in _around(width * scale, multiple)
        for h in _around(height * scale, multiple)
        if w * h <= model.max_pixels
    }
    aspect = math.log(width / height)
    ranked = sorted(candidates, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))
    return ranked[:2] if ranked else [model.default_size]


def _around(side: float, multiple: int) -> set[int]:
    down = math.floor(side / multiple) * multiple
    return {max(multiple, down), max(multiple, math.ceil(side / multiple) * multiple)}


def size_like(width: int, height: int, model: ModelInfo) -> tuple[int, int]:
    """The valid size of about the default's area whose aspect ratio is nearest to width : height."""
    scale = math.sqrt(math.prod(model.default_size) / (width * height))
    return nearest_sizes(max(1, round(width * scale)), max(1, round(height * scale)), model)[0]
