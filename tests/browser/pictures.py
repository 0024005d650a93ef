"""Moving test pictures: a low sun over water. Knows pixels and colours; knows nothing of servers or browsers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]

# zenith, horizon, sun, water; RGB 0 to 1
_PALETTES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "morning": ((0.42, 0.58, 0.74), (0.96, 0.82, 0.66), (1.0, 0.93, 0.78), (0.33, 0.45, 0.53)),
    "dusk": ((0.19, 0.17, 0.34), (0.95, 0.49, 0.27), (1.0, 0.80, 0.48), (0.20, 0.16, 0.25)),
    "storm": ((0.16, 0.20, 0.24), (0.55, 0.62, 0.62), (0.80, 0.85, 0.83), (0.12, 0.19, 0.21)),
    "night": ((0.02, 0.04, 0.11), (0.14, 0.22, 0.38), (0.88, 0.91, 0.98), (0.03, 0.06, 0.12)),
}


def render_frames(prompts: tuple[str, str, float], start_frame: int, num_frames: int, size: tuple[int, int]) -> Floats:
    """[F, H, W, 3] in 0 to 1. `prompts` are the old one, the new one and the weight of the new one.

    Computed at half the size and enlarged: a server that makes pictures faster than they are played is what we test.
    """
    old, new, weight = prompts
    zenith, horizon, sun, water = (
        (1 - weight) * np.array(a, np.float32) + weight * np.array(b, np.float32)
        for a, b in zip(_palette(old), _palette(new), strict=True)
    )
    width, height = (side // 2 for side in size)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * (width / height / 2)
    line = 0.62
    sky = zenith + (horizon - zenith) * np.clip(y / line, 0, 1) ** 1.8
    depth = np.clip((y - line) / (1 - line), 0, 1)
    sea = horizon * 0.55 + (water - horizon * 0.55) * np.sqrt(depth)
    frames = []
    for frame in range(start_frame, start_frame + num_frames):
        t = frame / 24
        cx, cy = -0.35 + 0.09 * t, 0.44 - 0.05 * np.sin(0.3 * t)
        distance = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
        glow = np.exp(-((distance / 0.34) ** 2)) * 0.55 + np.clip((0.082 - distance) * 90, 0, 1)
        ripple = np.sin(90 * depth**0.5 - 3.1 * t + 2.2 * np.sin(4 * x + 0.8 * t)) * (0.4 + depth)
        glint = np.exp(-(((x - cx) / (0.05 + 0.24 * depth)) ** 2)) * np.clip(ripple, 0, 1) * 0.75
        picture = np.where(
            y < line, sky + (sun - sky) * np.clip(glow, 0, 1), sea + ripple * 0.018 + (sun - sea) * glint
        )
        small = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
        frames.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32) / 255)
    return np.stack(frames)


def yuv420(rgb: Floats) -> npt.NDArray[np.uint8]:
    """[F, H, W, 3] in 0 to 1 -> [F, H*3/2, W] uint8, planar, BT.709 limited range."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    count, height, width = luma.shape
    planes = [(16 + 219 * luma).reshape(count, height, width)]
    for chroma in ((blue - luma) / 1.8556, (red - luma) / 1.5748):
        small = chroma.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
        planes.append((128 + 224 * small).reshape(count, height // 4, width))
    return np.concatenate(planes, axis=1).round().astype(np.uint8)


def _palette(prompt: str) -> tuple[tuple[float, float, float], ...]:
    return next((colours for word, colours in _PALETTES.items() if word in prompt), _PALETTES["morning"])
