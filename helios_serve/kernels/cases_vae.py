"""The VAE's operators as a list: what tests compare and benchmarks time.

Knows how to make inputs of a shape; measures and compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels import reference_vae
from helios_serve.kernels.vae_epilogue import add_bias, launch_add_bias, launch_place_with_bias, place_with_bias
from helios_serve.kernels.vae_norm_silu import launch_norm_rows, norm_rows
from helios_serve.kernels.yuv import launch_rgb_to_yuv420, launch_to_uint8, rgb_to_yuv420, to_uint8

Shape = tuple[int, ...]
MARGIN = 64  # values of NaN before and behind each tensor: 16 bytes of alignment stay


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCase:
    """One operator, its kernel and its definition, which are called with the same arguments.

    inputs: makes the arguments on the default device from a shape and a dtype; what is written only is NaN. written:
    index of the argument that holds the result; None if it is returned. is_exact: kernel and reference agree in every
    bit. odd: shapes for tests. served: shapes of a 640x384 chunk.
    """

    name: str
    operator: Callable[..., Any]
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype], list[Any]]
    written: int | None
    is_exact: bool
    odd: tuple[Shape, ...]
    served: tuple[Shape, ...]


def poisoned(values: Tensor) -> Tensor:
    """A copy that lies between NaN, or between the value 77 for integers."""
    poison = torch.nan if values.is_floating_point() else 77
    memory = torch.full((values.numel() + 2 * MARGIN,), poison, dtype=values.dtype)
    memory[MARGIN:-MARGIN] = values.flatten()
    return memory[MARGIN:-MARGIN].view(values.shape)


def _draw(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Quarters up to 2 in bfloat16: sums of three are exact, whether a machine rounds or cuts off."""
    if dtype == torch.bfloat16:
        return poisoned((torch.randint(-8, 9, shape) / 4).to(dtype))
    return poisoned(torch.randn(shape, dtype=dtype))


def _norm_rows(shape: Shape, dtype: torch.dtype) -> list[Any]:
    clips, rows, left, channels = shape
    x, gamma, bias = (_draw(one, dtype) for one in ((clips, rows, channels), (channels,), (channels,)))
    context = _draw((clips, left, channels), dtype) if left else None
    out = poisoned(torch.full((clips, left + rows, channels), torch.nan, dtype=dtype))
    return [x, gamma, bias, context, True, out]


def _add_bias(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [_draw(shape, dtype), _draw(shape[1:], dtype), _draw(shape, dtype)]


def _place_with_bias(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """One phase of a folded upsampling: from a quarter of the channels to every second pixel."""
    frames, height, width, channels = shape
    x = _draw((frames, height + 1, width + 1, 4 * channels), dtype)[:, 1:, :width, channels : 2 * channels]
    out = poisoned(torch.full((frames, 2 * height, 2 * width, channels), torch.nan, dtype=dtype))
    return [x, _draw((channels,), dtype), out[:, 1::2, ::2]]


def _frames(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """Out of range at both ends; channels last, as the decoder leaves them."""
    frames, height, width = shape
    return [poisoned((torch.rand(frames, height, width, 3) * 2.4 - 1.2).to(dtype)).permute(0, 3, 1, 2)]


_PIXELS = 33 * 384 * 640

CASES = (
    OpCase(
        name="norm_rows",
        operator=norm_rows,
        launch=launch_norm_rows,
        reference=reference_vae.norm_rows,
        inputs=_norm_rows,
        written=5,
        is_exact=False,
        odd=((1, 1, 0, 40), (2, 67, 10, 24), (1, 541, 38, 96), (1, 13, 26, 130)),
        served=((1, _PIXELS, 2 * 384 * 640, 96), (1, _PIXELS // 4, 2 * 192 * 320, 192), (1, 9 * 48 * 80, 7680, 384)),
    ),
    OpCase(
        name="add_bias",
        operator=add_bias,
        launch=launch_add_bias,
        reference=reference_vae.add_bias,
        inputs=_add_bias,
        written=0,
        is_exact=True,
        odd=((1, 40), (67, 24), (541, 96), (13, 130), (29, 3)),
        served=((_PIXELS, 96), (_PIXELS // 4, 192), (9 * 48 * 80, 384), (_PIXELS, 3)),
    ),
    OpCase(
        name="place_with_bias",
        operator=place_with_bias,
        launch=launch_place_with_bias,
        reference=reference_vae.place_with_bias,
        inputs=_place_with_bias,
        written=2,
        is_exact=True,
        odd=((1, 1, 1, 40), (2, 3, 7, 24), (1, 2, 67, 96)),
        served=((33, 192, 320, 96), (33, 96, 160, 192), (17, 48, 80, 192)),
    ),
    OpCase(
        name="to_uint8",
        operator=to_uint8,
        launch=launch_to_uint8,
        reference=reference_vae.to_uint8,
        inputs=_frames,
        written=None,
        is_exact=True,
        odd=((1, 1, 1), (2, 5, 131), (1, 6, 300)),
        served=((33, 384, 640),),
    ),
    OpCase(
        name="rgb_to_yuv420",
        operator=rgb_to_yuv420,
        launch=launch_rgb_to_yuv420,
        reference=reference_vae.rgb_to_yuv420,
        inputs=_frames,
        written=None,
        is_exact=True,
        odd=((1, 2, 2), (2, 6, 258), (1, 4, 514)),
        served=((33, 384, 640),),
    ),
)
