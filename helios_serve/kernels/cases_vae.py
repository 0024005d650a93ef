"""The VAE's operators as a list: what tests compare and benchmarks time.

Knows how to make inputs of a shape; measures and compares nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from helios_serve.kernels import reference_vae
from helios_serve.kernels.op_case import OpCase, Shape, draw, poisoned, unwritten
from helios_serve.kernels.vae_epilogue import add_bias, launch_add_bias, launch_place_with_bias, place_with_bias
from helios_serve.kernels.vae_norm_silu import launch_norm_rows, launch_norm_windows, norm_rows, norm_windows
from helios_serve.kernels.yuv import launch_rgb_to_yuv420, launch_to_uint8, rgb_to_yuv420, to_uint8


def _norm_rows(shape: Shape, dtype: torch.dtype) -> list[Any]:
    clips, rows, left, channels = shape
    x, gamma, bias = (draw(one, dtype) for one in ((clips, rows, channels), (channels,), (channels,)))
    context = draw((clips, left, channels), dtype) if left else None
    out = unwritten((clips, left + rows, channels), dtype)
    return [x, gamma, bias, context, True, out]


def _norm_windows(shape: Shape, dtype: torch.dtype) -> list[Any]:
    clips, frames, frame_rows, has_left, channels = shape
    x, gamma, bias = (draw(one, dtype) for one in ((clips, frames * frame_rows, channels), (channels,), (channels,)))
    context = draw((clips, 2 * frame_rows, channels), dtype) if has_left else None
    out = unwritten((clips, frames * frame_rows, 3, channels), dtype)
    return [x, gamma, bias, context, True, frame_rows, out]


def _add_bias(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [draw(shape, dtype), draw(shape[1:], dtype), draw(shape, dtype)]


def _place_with_bias(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """One phase of a folded upsampling: from a quarter of the channels to every second pixel."""
    frames, height, width, channels = shape
    x = draw((frames, height + 1, width + 1, 4 * channels), dtype)[:, 1:, :width, channels : 2 * channels]
    out = unwritten((frames, 2 * height, 2 * width, channels), dtype)
    return [x, draw((channels,), dtype), out[:, 1::2, ::2]]


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
        written=(5,),
        odd=((1, 1, 0, 40), (2, 67, 10, 24), (1, 541, 38, 96), (1, 13, 26, 130)),
        served=((1, _PIXELS, 2 * 384 * 640, 96), (1, _PIXELS // 4, 2 * 192 * 320, 192), (1, 9 * 48 * 80, 7680, 384)),
    ),
    OpCase(
        name="norm_windows",
        operator=norm_windows,
        launch=launch_norm_windows,
        reference=reference_vae.norm_windows,
        inputs=_norm_windows,
        written=(6,),
        odd=((1, 1, 1, 0, 40), (2, 3, 67, 1, 24), (1, 4, 135, 0, 96), (1, 1, 13, 1, 130)),
        served=((1, 16, 96 * 160, 1, 384), (1, 33, 384 * 640, 1, 96)),
    ),
    OpCase(
        name="add_bias",
        operator=add_bias,
        launch=launch_add_bias,
        reference=reference_vae.add_bias,
        inputs=_add_bias,
        written=(0,),
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
        written=(2,),
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
        is_exact=True,
        odd=((1, 2, 2), (2, 6, 258), (1, 4, 514)),
        served=((33, 384, 640),),
    ),
)
