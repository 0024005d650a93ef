"""The VAE's RMS norm over the channels with SiLU, on flat rows of pixels, written straight to where a causal
convolution reads: behind the frames that it looks back at, or into the windows of frames that it sees.

One program takes a tile of several rows, each of which is read once, and no position is divided into frame, line and
column. Statistics are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from helios_serve.kernels import reference_vae
from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, operator, tl

_TILE = 4096  # values of a program
_NUM_WARPS = 4


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
    place = start + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    is_channel = channel < C
    is_row = (place >= num_left) & (place < num_left + num_rows) & is_channel
    tile = tl.arange(0, ROWS)[:, None] * C + channel
    raw = tl.load(x_ptr + ((clip * num_rows + start - num_left) * C + tile), mask=is_row, other=0.0)
    value = raw.to(WIDE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(WIDE)
        value = tl.where(is_channel, (value + bias).to(x_ptr.dtype.element_ty).to(WIDE), 0.0)
    gamma = tl.load(gamma_ptr + channel, mask=is_channel, other=0.0).to(WIDE)
    length = tl.sqrt(tl.sum(value * value, 1))[:, None]
    out = value / tl.maximum(length, 1e-12) * (ROOT * gamma)
    if HAS_SILU:
        out = out / (1.0 + tl.exp(-out))
    is_left = (place < num_left) & is_channel
    if left_ptr is not None:
        left = tl.load(left_ptr + ((clip * num_left + start) * C + tile), mask=is_left, other=0.0)
        out = tl.where(is_left, left.to(WIDE), out)
    else:
        out = tl.where(is_left, 0.0, out)
    rounded = out.to(out_ptr.dtype.element_ty)
    if TAPS == 1:
        target = out_ptr + ((clip * (num_left + num_rows) + start) * C + tile)
        tl.store(target, rounded, mask=is_left | is_row)
    else:
        for tap in tl.static_range(TAPS):
            window = place - tap * frame_rows
            is_seen = (window >= 0) & (window < num_rows) & (is_left | is_row)
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
    block = block_of(channels)
    rows = rows_of(block)
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


def rows_of(block: int) -> int:
    """Rows of a program's tile, for rows that a block of channels covers."""
    return max(1, _TILE // block)


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
                "ROWS": rows_of(block_of(width)),
                "BLOCK": block_of(width),
            },
            num_warps=_NUM_WARPS,
        )
        for width in widths
        for name, types, rest in made
    )
