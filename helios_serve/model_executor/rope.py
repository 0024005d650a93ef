"""Rotary tables: one (cos, sin) row per token. Knows frame indices and patch grids; knows nothing of latents or heads.

Rows are float32 and hold each angle once: neighbouring channels of a head share it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Grid = tuple[int, int, int]
"""Token grid (frames, rows, columns)."""


@lru_cache(maxsize=64)
def rotary_rows(first_frame: int, grid: Grid, rope_dim: Grid, theta: float) -> Tensor:
    """Rotary rows of a token grid whose frames are numbered from `first_frame`.

    Rows and columns are numbered from 0 on the grid's own resolution, as in `HeliosRotaryPosEmbed`.

    Returns: [T * h * w, 2, Dh/2] float32 on the CPU; do not write to it, it is shared.
    """
    return _to_rows(_rotary_grid(tuple(range(first_frame, first_frame + grid[0])), grid, rope_dim, theta))


@lru_cache(maxsize=64)
def short_rotary_rows(frames: tuple[int, ...], grid: Grid, rope_dim: Grid, theta: float) -> Tensor:
    """Like `rotary_rows` for frames that do not follow each other, as the short history's 0 and 19."""
    return _to_rows(_rotary_grid(frames, grid, rope_dim, theta))


@lru_cache(maxsize=64)
def pooled_rotary_rows(first_frame: int, grid: Grid, factor: int, rope_dim: Grid, theta: float) -> Tensor:
    """Rotary rows of history that is patched `factor` times coarser on each axis.

    cos and sin of the full-resolution `grid` are replicate-padded at their ends and averaged, so that the rows are
    not unit vectors (quirk of the reference, kept).

    Returns: [ceil(T/factor) * ceil(h/factor) * ceil(w/factor), 2, Dh/2] float32 on the CPU, shared.
    """
    table = _rotary_grid(tuple(range(first_frame, first_frame + grid[0])), grid, rope_dim, theta)
    pad = [size for axis in reversed(grid) for size in (0, -axis % factor)]
    padded = F.pad(table[None], pad, mode="replicate")
    return _to_rows(F.avg_pool3d(padded, factor, stride=factor)[0])


def _rotary_grid(frames: tuple[int, ...], grid: Grid, rope_dim: Grid, theta: float) -> Tensor:
    """cos and sin of every angle on the grid: [2 * Dh/2, T, h, w] float32."""
    positions = (
        torch.tensor(frames, dtype=torch.float32)[:, None, None],
        torch.arange(grid[1], dtype=torch.float32)[None, :, None],
        torch.arange(grid[2], dtype=torch.float32)[None, None, :],
    )
    angles = [
        (_frequencies(dim, theta)[:, None, None, None] * position).expand(-1, len(frames), grid[1], grid[2])
        for dim, position in zip(rope_dim, positions, strict=True)
    ]
    angle = torch.cat(angles)  # (Dh/2, T, h, w)
    return torch.cat((angle.cos(), angle.sin()))


def _frequencies(dim: int, theta: float) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / (theta**exponent)


def _to_rows(table: Tensor) -> Tensor:
    """[2 * Dh/2, T, h, w] -> [T * h * w, 2, Dh/2]."""
    return table.flatten(1).T.unflatten(1, (2, -1)).contiguous()
