"""The VAE's RMS norm over the channels with SiLU, on flat rows of pixels, written straight to where a causal
convolution reads: behind the frames that it looks back at, or into the windows of frames that it sees.

One program takes a tile of several rows in parts of a third of their channels. Each row is read once, and no position
is divided into frame, line and column. Bias and gamma are read for each row, from the first-level cache: vectors that
all rows share would send the tile through shared memory, to threads that have a value of every row. Statistics are
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from helios_serve.kernels import reference_vae
from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, operator, tl

_TILE = 4096  # values of a program
_NUM_WARPS = 4
_MINUS_LOG2_E = tl and tl.constexpr(-math.log2(math.e))


@jit
def _norm_rows_kernel(
    x_ptr,
    gamma_ptr,
    bias_ptr,
    left_ptr,
    out_ptr,
    num_left,
    num_rows,
    frame_rows,
    C: tl.constexpr,
    ROOT: tl.constexpr,
    HAS_SILU: tl.constexpr,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    clip = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, ROWS)[:, None]
    place = start + tile
    is_left = place < num_left
    is_row = (place >= num_left) & (place < num_left + num_rows)
    x_ptr += (clip * num_rows + start - num_left) * C
    values = ()
    squares = tl.full((ROWS, BLOCK), 0.0, WIDE)
    for first in tl.static_range(0, C, BLOCK):
        channel = first + tl.arange(0, BLOCK)[None, :]
        is_read = is_row & (channel < C)
        value = tl.load(x_ptr + (tile * C + channel), mask=is_read, other=0.0).to(WIDE)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + (tile * 0 + channel), mask=is_read, other=0.0).to(WIDE)
            value = (value + bias).to(x_ptr.dtype.element_ty).to(WIDE)
        squares += value * value
        values += (value,)
    factor = ROOT / tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-12)[:, None]
    for first in tl.static_range(0, C, BLOCK):
        channel = first + tl.arange(0, BLOCK)[None, :]
        is_channel = channel < C
        gamma = tl.load(gamma_ptr + (tile * 0 + channel), mask=is_row & is_channel, other=0.0).to(WIDE)
        out = values[first // BLOCK] * factor * gamma
        if HAS_SILU:
            root = tl.rsqrt(1.0 + tl.exp2(out * _MINUS_LOG2_E))  # its square is the logistic function of `out`
            out = out * (root * root)
        if left_ptr is not None:
            source = left_ptr + (clip * num_left + start) * C + (tile * C + channel)
            left = tl.load(source, mask=is_left & is_channel, other=0.0)
            out = tl.where(is_left, left.to(WIDE), out)
        rounded = out.to(out_ptr.dtype.element_ty)
        is_written = (is_left | is_row) & is_channel
        if TAPS == 1:
            target = out_ptr + (clip * (num_left + num_rows) + start) * C + (tile * C + channel)
            tl.store(target, rounded, mask=is_written)
        else:
            for tap in tl.static_range(TAPS):
                window = place - tap * frame_rows
                is_seen = (window >= 0) & (window < num_rows) & is_written
                target = out_ptr + ((clip * num_rows + window) * TAPS + tap) * C + channel
                tl.store(target, rounded, mask=is_seen)


def launch_norm_rows(
    x: Tensor, gamma: Tensor, bias: Tensor | None, left: Tensor | None, has_silu: bool, out: Tensor
) -> None:
    """`reference.norm_rows` by Triton."""
    num_left = out.shape[1] - x.shape[1]
    assert out.shape == (len(x), num_left + x.shape[1], x.shape[2])
    _launch(x, gamma, bias, left, has_silu, out, num_left, taps=1)


def launch_norm_windows(
    x: Tensor, gamma: Tensor, bias: Tensor | None, left: Tensor | None, has_silu: bool, frame_rows: int, out: Tensor
) -> None:
    """`reference.norm_windows` by Triton."""
    taps = out.shape[2]
    assert out.shape == (*x.shape[:2], taps, x.shape[2])
    _launch(x, gamma, bias, left, has_silu, out, (taps - 1) * frame_rows, taps)


def _launch(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    has_silu: bool,
    out: Tensor,
    num_left: int,
    taps: int,
) -> None:
    num_clips, num_rows, channels = x.shape
    assert left is None or left.shape == (num_clips, num_left, channels)
    assert all(one is None or one.is_contiguous() for one in (x, gamma, bias, left, out))
    block = part_of(channels)
    rows = rows_of(channels)
    _norm_rows_kernel[(-(-(num_left + num_rows) // rows), num_clips)](
        x,
        gamma,
        bias,
        left,
        out,
        num_left,
        num_rows,
        num_left // max(1, taps - 1),
        C=channels,
        ROOT=channels**0.5,
        HAS_SILU=has_silu,
        TAPS=taps,
        WIDE=accumulator(x),
        ROWS=rows,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )


def part_of(channels: int) -> int:
    """The power of two in parts of which a row is taken: 96, 192 and 384 channels are three."""
    return max(16, block_of(channels) // 4)


def rows_of(channels: int) -> int:
    """Rows of a program's tile, which with all powers of two of channels has `_TILE` values at most."""
    return max(1, _TILE // block_of(channels))


norm_rows = operator(
    "vae_norm_rows(Tensor x, Tensor gamma, Tensor? bias, Tensor? left, bool has_silu, Tensor(a!) out) -> ()",
    reference=reference_vae.norm_rows,
    kernel=launch_norm_rows,
    shapes=lambda *_: None,
)


norm_windows = operator(
    "vae_norm_windows(Tensor x, Tensor gamma, Tensor? bias, Tensor? left, bool has_silu, int frame_rows, "
    "Tensor(a!) out) -> ()",
    reference=reference_vae.norm_windows,
    kernel=launch_norm_windows,
    shapes=lambda *_: None,
)


def specialisations(widths: tuple[int, ...]) -> tuple[Specialisation, ...]:
    """What a decoder with those numbers of channels launches in bfloat16."""
    tensors = {"x_ptr": "*bf16", "gamma_ptr": "*bf16", "out_ptr": "*bf16"}
    tensors |= dict.fromkeys(("num_left", "num_rows", "frame_rows"), "i32")
    bias, left = {"bias_ptr": "*bf16"}, {"left_ptr": "*bf16"}
    made: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
        ("vae_norm_rows", tensors, {"bias_ptr": None, "left_ptr": None, "TAPS": 1}),
        ("vae_norm_rows_bias", {**tensors, **bias}, {"left_ptr": None, "TAPS": 1}),
        ("vae_norm_rows_bias_left", {**tensors, **bias, **left}, {"TAPS": 1}),
        ("vae_norm_windows_bias", {**tensors, **bias}, {"left_ptr": None, "TAPS": 3}),
        ("vae_norm_windows_bias_left", {**tensors, **bias, **left}, {"TAPS": 3}),
    )
    return tuple(
        Specialisation(
            name=f"{name}_{width}",
            kernel=_norm_rows_kernel,
            types=types,
            constants={
                **rest,
                "C": width,
                "ROOT": width**0.5,
                "HAS_SILU": True,
                "WIDE": tl.float32,
                "ROWS": rows_of(width),
                "BLOCK": part_of(width),
            },
            num_warps=_NUM_WARPS,
        )
        for width in widths
        for name, types, rest in made
    )
