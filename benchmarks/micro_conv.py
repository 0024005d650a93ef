"""3x3x3 convolutions of the VAE's decoder at its shapes, in the ways that a library can be asked for them.

Knows shapes, layouts and targets; knows no VAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.plan import Bench, Measurement, Section
from benchmarks.timing import twice
from helios_serve.model_executor.vae import VaeOptions

_CONTEXT = 2  # frames that a causal convolution looks back at


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Channels in and out, frames, height and width of the result; TFLOP/s to reach."""

    channels: int
    frames: int
    height: int
    width: int
    gate: float
    goal: float

    @property
    def operations(self) -> int:
        return 2 * 27 * self.channels**2 * self.frames * self.height * self.width


_FULL = (
    _Grid(channels=96, frames=33, height=384, width=640, gate=250, goal=350),
    _Grid(channels=192, frames=33, height=192, width=320, gate=400, goal=550),
    _Grid(channels=384, frames=17, height=96, width=160, gate=450, goal=600),
)
TINY_GRIDS = (_Grid(channels=8, frames=3, height=4, width=6, gate=0, goal=0),)
_LIMIT = 790.0
_WINDOWED_CHANNELS = VaeOptions.on(torch.device("cuda")).windowed_channels
Convolve = Callable[[Tensor, Tensor], Tensor]


def channels_last(x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN on NDHWC, as it chooses by itself."""
    return F.conv3d(x, weight, None, 1, (0, 1, 1))


def channels_first(x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN on NCDHW; `x` and `weight` must be in that layout."""
    return F.conv3d(x, weight, None, 1, (0, 1, 1))


def three_flat(x: Tensor, weight: Tensor) -> Tensor:
    """One conv2d for each tap in time, frames as the batch, added up: [1, C, T + 2, H, W] -> [T, C', H, W]."""
    frames = x[0].transpose(0, 1)  # (T + 2, C, H, W), channels last
    num_frames = len(frames) - _CONTEXT
    out = F.conv2d(frames[:num_frames], weight[:, :, 0], None, 1, 1)
    for tap in (1, 2):
        out += F.conv2d(frames[tap : tap + num_frames], weight[:, :, tap], None, 1, 1)
    return out


def windowed(x: Tensor, weight: Tensor) -> Tensor:
    """One conv2d over what `side_by_side` makes, as the norm before it writes it: -> [T, C', H, W]."""
    return F.conv2d(x, weight, None, 1, 1)


def side_by_side(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The three frames that a pixel sees as channels: [T, 3C, H, W] and [C', 3C, 3, 3], channels last."""
    pixels = x[0].permute(1, 2, 3, 0)  # (T + 2, H, W, C)
    num_frames = len(pixels) - _CONTEXT
    beside = torch.cat([pixels[tap : tap + num_frames] for tap in range(3)], dim=-1).permute(0, 3, 1, 2)
    flat = weight.permute(0, 2, 1, 3, 4).flatten(1, 2)  # (C', 3 C, 3, 3), taps in time outside
    return beside, flat.contiguous(memory_format=torch.channels_last)


VARIANTS: tuple[Convolve, ...] = (
    channels_last,
    three_flat,
    windowed,
    channels_first,
)


def conv3d(bench: Bench) -> list[Measurement]:
    """All variants at all grids."""
    made: list[Measurement] = []
    for grid in _FULL if bench.sizes.is_full else TINY_GRIDS:
        x, weight = draw(grid, bench.device, bench.sizes.dtype)
        for variant in VARIANTS:
            name = f"micro/conv3d/{variant.__name__}/C{grid.channels}"
            made += bench.attempt(name, partial(_variant, bench, grid, variant, x, weight, name))
    return made


def draw(grid: _Grid, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input with its context and weight, channels last."""
    channels = grid.channels
    shape = (1, channels, grid.frames + _CONTEXT, grid.height, grid.width)
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last_3d).normal_()
    weight = torch.randn(channels, channels, 3, 3, 3, dtype=dtype, device=device) / (27 * channels) ** 0.5
    return x, weight.contiguous(memory_format=torch.channels_last_3d)


def _variant(bench: Bench, grid: _Grid, variant: Convolve, x: Tensor, weight: Tensor, name: str) -> Measurement:
    """One input is more than the caches hold."""
    if variant is channels_first:
        x, weight = x.contiguous(), weight.contiguous()
    if variant is windowed:
        x, weight = side_by_side(x, weight)
    served = windowed if grid.channels in _WINDOWED_CHANNELS else channels_last
    out = variant(x, weight)
    repetitions = max(2, bench.sizes.repetitions // 2)
    taken, spread = twice(lambda: bench.clock.measure(lambda _: variant(x, weight), repetitions=repetitions))
    return Measurement(
        name=name,
        unit="TFLOP/s",
        samples=taken.per_second(grid.operations / 1e12),
        gate=grid.gate if variant is served else None,
        goal=grid.goal if variant is served else None,
        limit=_LIMIT if variant is served else None,
        is_better_high=True,
        details={"ms": taken.median, "spread": spread, "is_channels_last": out.stride(1) == 1},
    )


SECTIONS = (Section(name="micro/conv3d", value_rank=20, expected_s=10, run=conv3d),)
