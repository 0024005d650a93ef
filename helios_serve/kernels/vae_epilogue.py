"""What follows a convolution of the VAE: its bias, with a residual in place, or with the way to where the result
belongs. And the convolution itself, which keeps the channels last.

Kernels address rows of pixels and round as PyTorch's convolution and addition do: the same bits, one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.kernels import reference_vae
from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, operator, tl
from helios_serve.kernels.vae_norm_silu import rows_of

_NUM_WARPS = 4
_NARROW, _FOLD = 16, 32
"""Rows of fewer values than the first are taken so many at a time: three channels are rows of 96 values."""
_EXACT = {"enable_fp_fusion": False}


@jit
def _add_bias_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    num_values,
    C: tl.constexpr,
    PERIOD: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of C values, in which the bias comes again after PERIOD."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    channel = tl.arange(0, BLOCK)[None, :]
    tile = start * C + (tl.arange(0, ROWS)[:, None] * C + channel)
    is_inside = (tile < num_values) & (channel < C)
    bias = tl.load(bias_ptr + channel % PERIOD, mask=channel < C, other=0.0).to(WIDE)
    out = (tl.load(x_ptr + tile, mask=is_inside, other=0.0).to(WIDE) + bias).to(x_ptr.dtype.element_ty)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + tile, mask=is_inside, other=0.0).to(WIDE)
        out = (out.to(WIDE) + residual).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + tile, out, mask=is_inside)


@jit
def _place_with_bias_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    width,
    x_frame,
    x_line,
    x_column,
    out_frame,
    out_line,
    out_column,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    line = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(2).to(tl.int64)
    column = start + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    is_inside = (column < width) & (channel < C)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(WIDE)
    source = x_ptr + (frame * x_frame + line * x_line) + column * x_column + channel
    out = tl.load(source, mask=is_inside, other=0.0).to(WIDE) + bias
    target = out_ptr + (frame * out_frame + line * out_line) + column * out_column + channel
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=is_inside)


def launch_add_bias(x: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """`reference.add_bias` by Triton."""
    assert residual is None or residual.shape == x.shape
    assert all(one is None or one.is_contiguous() for one in (x, bias, residual))
    channels = x.shape[1]
    width = _width_of(channels)
    _add_bias_kernel[(-(-x.numel() // (rows_of(width) * width)),)](
        x,
        bias,
        residual,
        x.numel(),
        C=width,
        PERIOD=channels,
        WIDE=accumulator(x),
        ROWS=rows_of(width),
        BLOCK=block_of(width),
        num_warps=_NUM_WARPS,
        **_EXACT,
    )


def _width_of(channels: int) -> int:
    """Values of a row as the kernel takes them."""
    return channels if channels >= _NARROW else channels * _FOLD


def launch_place_with_bias(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """`reference.place_with_bias` by Triton."""
    assert x.shape == out.shape
    assert x.stride(-1) == out.stride(-1) == bias.stride(-1) == 1
    num_frames, height, width, channels = x.shape
    rows = rows_of(channels)
    _place_with_bias_kernel[(-(-width // rows), height, num_frames)](
        x,
        bias,
        out,
        width,
        *x.stride()[:3],
        *out.stride()[:3],
        C=channels,
        WIDE=accumulator(x),
        ROWS=rows,
        BLOCK=block_of(channels),
        num_warps=_NUM_WARPS,
        **_EXACT,
    )


def cudnn_convolve(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """`reference.convolve` by cuDNN, whose result is in the layout of `x`."""
    apply = F.conv2d if x.dim() == 4 else F.conv3d
    return apply(x, weight, None, 1, tuple(padding))


def _empty_convolved(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    grid = [size + 2 * pad - taps + 1 for size, pad, taps in zip(x.shape[2:], padding, weight.shape[2:], strict=True)]
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    shape = (x.shape[0], weight.shape[0], *grid)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


add_bias = operator(
    "vae_add_bias(Tensor(a!) x, Tensor bias, Tensor? residual) -> ()",
    reference=reference_vae.add_bias,
    kernel=launch_add_bias,
    shapes=lambda *_: None,
)
place_with_bias = operator(
    "vae_place_with_bias(Tensor x, Tensor bias, Tensor(a!) out) -> ()",
    reference=reference_vae.place_with_bias,
    kernel=launch_place_with_bias,
    shapes=lambda *_: None,
)
convolve = operator(
    "vae_convolve(Tensor x, Tensor weight, int[] padding) -> Tensor",
    reference=reference_vae.convolve,
    kernel=cudnn_convolve,
    shapes=_empty_convolved,
)


def specialisations(widths: tuple[int, ...]) -> tuple[Specialisation, ...]:
    """What a decoder with those numbers of channels, and three in its picture, launches in bfloat16."""
    return (*(one for width in (*widths, 3) for one in _biased(width)), *(_placed(width) for width in widths))


def _tile(width: int) -> dict[str, Any]:
    return {"C": width, "WIDE": tl.float32, "ROWS": rows_of(width), "BLOCK": block_of(width)}


def _biased(channels: int) -> tuple[Specialisation, ...]:
    types = {"x_ptr": "*bf16", "bias_ptr": "*bf16", "num_values": "i32"}
    constants = {**_tile(_width_of(channels)), "PERIOD": channels}
    return (
        _specialisation(f"vae_add_bias_{channels}", _add_bias_kernel, types, {**constants, "residual_ptr": None}),
        _specialisation(
            f"vae_add_bias_residual_{channels}", _add_bias_kernel, {**types, "residual_ptr": "*bf16"}, constants
        ),
    )


def _placed(width: int) -> Specialisation:
    strides = ("x_frame", "x_line", "x_column", "out_frame", "out_line", "out_column")
    types = {**dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*bf16"), **dict.fromkeys(("width", *strides), "i32")}
    return _specialisation(f"vae_place_with_bias_{width}", _place_with_bias_kernel, types, _tile(width))


def _specialisation(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Specialisation:
    return Specialisation(
        name=name, kernel=kernel, types=types, constants=constants, num_warps=_NUM_WARPS, is_contracted=False
    )
