"""Decoded frames as bytes on their device: RGB, or planar YUV 4:2:0 for encoders.

One pass over the frames, in any layout. Every product, sum and quotient is rounded in float32 by itself, in the order
of the reference: the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels import reference_vae
from helios_serve.kernels.launch import Specialisation, jit, operator, tl
from helios_serve.kernels.row_parts import divided

_FLAT_BLOCK = 2048  # values of a program
_BLOCK = 64  # columns of chroma of a program, each of two pixels: a line of 640 is five
_NUM_WARPS = 2
_EXACT = {"enable_fp_fusion": False}
_OF_BLUE, _OF_RED = (tl and tl.constexpr(float(1 / torch.tensor(span))) for span in (1.8556, 1.5748))
"""Inverse spans of both chroma, rounded to float32."""


@jit
def _rounded(x):
    """To the nearest integer, half to even: the sum has no bits left below 1. For |x| < 2^22, in float32."""
    return (x + 12582912.0) - 12582912.0


@jit
def _unit(x_ptr, is_inside):
    value = tl.load(x_ptr, mask=is_inside, other=0.0).to(tl.float32) * 0.5 + 0.5
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@jit
def _uint8_kernel(x_ptr, out_ptr, num_values, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < num_values
    value = _rounded(_unit(x_ptr + place, is_inside) * 255.0)
    tl.store(out_ptr + place, value.to(tl.uint8), mask=is_inside)


@jit
def _luma_chroma(x_ptr, channel_stride, is_inside):
    """Luma in [0, 1] and both chroma in [-0.5, 0.5] of one pixel each."""
    red = _unit(x_ptr, is_inside)
    green = _unit(x_ptr + channel_stride, is_inside)
    blue = _unit(x_ptr + 2 * channel_stride, is_inside)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return luma, divided(blue - luma, 1.8556, _OF_BLUE), divided(red - luma, 1.5748, _OF_RED)


@jit
def _luma_code(luma):
    return _rounded(16.0 + 219.0 * luma).to(tl.uint8)


@jit
def _chroma_code(a, b, c, d):
    """Of the mean of four pixels, added up in the order of the lines."""
    return _rounded(128.0 + 224.0 * ((((a + b) + c) + d) * 0.25)).to(tl.uint8)


@jit
def _yuv420_kernel(
    x_ptr,
    out_ptr,
    height,
    width,
    frame_stride,
    channel_stride,
    line_stride,
    column_stride,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of chroma
    half = width // 2
    is_inside = column < half
    corner = x_ptr + (frame * frame_stride + 2 * pair * line_stride) + 2 * column.to(tl.int64) * column_stride
    y0, u0, v0 = _luma_chroma(corner, channel_stride, is_inside)
    y1, u1, v1 = _luma_chroma(corner + column_stride, channel_stride, is_inside)
    y2, u2, v2 = _luma_chroma(corner + line_stride, channel_stride, is_inside)
    y3, u3, v3 = _luma_chroma(corner + line_stride + column_stride, channel_stride, is_inside)
    picture = out_ptr + frame * (height * width * 3 // 2)
    luma = picture + 2 * pair * width + 2 * column
    tl.store(luma, _luma_code(y0), mask=is_inside)
    tl.store(luma + 1, _luma_code(y1), mask=is_inside)
    tl.store(luma + width, _luma_code(y2), mask=is_inside)
    tl.store(luma + width + 1, _luma_code(y3), mask=is_inside)
    chroma = picture + height * width + pair * half + column
    tl.store(chroma, _chroma_code(u0, u1, u2, u3), mask=is_inside)
    tl.store(chroma + (height // 2) * half, _chroma_code(v0, v1, v2, v3), mask=is_inside)


def launch_to_uint8(frames: Tensor) -> Tensor:
    """`reference.to_uint8` by Triton; what does not have its channels last is copied first."""
    values, out = frames.permute(0, 2, 3, 1).contiguous(), _empty_rgb(frames)
    grid = (-(-out.numel() // _FLAT_BLOCK),)
    _uint8_kernel[grid](values, out, out.numel(), BLOCK=_FLAT_BLOCK, num_warps=_NUM_WARPS, **_EXACT)
    return out


def launch_rgb_to_yuv420(frames: Tensor) -> Tensor:
    """`reference.rgb_to_yuv420` by Triton."""
    num_frames, _, height, width = frames.shape
    out = _empty_yuv(frames)
    grid = (-(-width // (2 * _BLOCK)), height // 2, num_frames)
    _yuv420_kernel[grid](frames, out, height, width, *frames.stride(), BLOCK=_BLOCK, num_warps=_NUM_WARPS, **_EXACT)
    return out


def _empty_rgb(frames: Tensor) -> Tensor:
    num_frames, channels, height, width = frames.shape
    assert channels == 3
    return torch.empty((num_frames, height, width, 3), dtype=torch.uint8, device=frames.device)


def _empty_yuv(frames: Tensor) -> Tensor:
    num_frames, channels, height, width = frames.shape
    assert channels == 3
    assert height % 2 == width % 2 == 0
    return torch.empty((num_frames, height * 3 // 2, width), dtype=torch.uint8, device=frames.device)


to_uint8 = operator(
    "to_uint8(Tensor frames) -> Tensor",
    reference=reference_vae.to_uint8,
    kernel=launch_to_uint8,
    shapes=_empty_rgb,
)
rgb_to_yuv420 = operator(
    "rgb_to_yuv420(Tensor frames) -> Tensor",
    reference=reference_vae.rgb_to_yuv420,
    kernel=launch_rgb_to_yuv420,
    shapes=_empty_yuv,
)


def specialisations() -> tuple[Specialisation, ...]:
    """What a decoder with channels last launches in bfloat16."""
    tensors = {"x_ptr": "*bf16", "out_ptr": "*u8"}
    sizes = dict.fromkeys(("height", "width", "frame_stride", "line_stride", "column_stride"), "i32")
    return (
        Specialisation(
            name="to_uint8",
            kernel=_uint8_kernel,
            types={**tensors, "num_values": "i32"},
            constants={"BLOCK": _FLAT_BLOCK},
            num_warps=_NUM_WARPS,
            is_contracted=False,
        ),
        Specialisation(
            name="rgb_to_yuv420",
            kernel=_yuv420_kernel,
            types={**tensors, **sizes},
            constants={"BLOCK": _BLOCK, "channel_stride": 1},
            num_warps=_NUM_WARPS,
            is_contracted=False,
        ),
    )
