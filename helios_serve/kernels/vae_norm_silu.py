"""The VAE's RMS norm over the channels with SiLU, on flat rows of pixels, written straight behind the frames that a
causal convolution looks back at.

One program takes a tile of several rows: each row is read once and written once, and no position is divided into frame,
line and column. Statistics are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

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
    C: tl.constexpr,
    ROOT: tl.constexpr,
    HAS_SILU: tl.constexpr,
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
    target = out_ptr + ((clip * (num_left + num_rows) + start) * C + tile)
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=is_left | is_row)


def launch_norm_rows(
    x: Tensor, gamma: Tensor, bias: Tensor | None, left: Tensor | None, has_silu: bool, out: Tensor
) -> None:
    """`reference.norm_rows` by Triton."""
    num_clips, num_rows, channels = x.shape
    num_left = out.shape[1] - num_rows
    assert out.shape == (num_clips, num_left + num_rows, channels)
    assert left is None or left.shape == (num_clips, num_left, channels)
    assert all(one is None or one.is_contiguous() for one in (x, gamma, bias, left, out))
    block = block_of(channels)
    rows = rows_of(block)
    _norm_rows_kernel[(-(-out.shape[1] // rows), num_clips)](
        x,
        gamma,
        bias,
        left,
        out,
        num_left,
        num_rows,
        C=channels,
        ROOT=channels**0.5,
        HAS_SILU=has_silu,
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


def specialisations(widths: tuple[int, ...]) -> tuple[Specialisation, ...]:
    """What a decoder with those numbers of channels launches in bfloat16."""
    tensors = {"x_ptr": "*bf16", "gamma_ptr": "*bf16", "out_ptr": "*bf16", "num_left": "i32", "num_rows": "i32"}
    bias, left = {"bias_ptr": "*bf16"}, {"left_ptr": "*bf16"}
    made: tuple[tuple[str, dict[str, str], dict[str, None]], ...] = (
        ("vae_norm_rows", tensors, {"bias_ptr": None, "left_ptr": None}),
        ("vae_norm_rows_bias", {**tensors, **bias}, {"left_ptr": None}),
        ("vae_norm_rows_bias_left", {**tensors, **bias, **left}, {}),
    )
    return tuple(
        Specialisation(
            name=f"{name}_{width}",
            kernel=_norm_rows_kernel,
            types=types,
            constants={
                **absent,
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
        for name, types, absent in made
    )
