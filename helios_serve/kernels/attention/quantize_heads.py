"""Rounding of packed heads to e4m3 with one scale for each sequence and head, as attention in FP8 takes them.

Two launches: the largest entry of each head in each block of tokens, then the scale from those of a whole sequence, and
the rounding. Knows heads and where sequences begin; knows nothing of attention. e4m3 needs compute capability 8.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels.attention.segments import NUM_SHAPES, on_device
from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.launch import Specialisation, block_of, jit, operator, tl
from helios_serve.kernels.reference_fp8 import quantize_heads as reference_quantize_heads
from helios_serve.kernels.row_parts import divided

BLOCK_TOKENS = 64
NUM_WARPS = 4
_BLOCK_PEAKS = 64  # that a program reads at a time
_COLUMNS = 5


@jit
def _head_peaks_kernel(
    x_ptr,
    peaks_ptr,
    table_ptr,
    token_stride,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    place = table_ptr + block * COLUMNS
    token = tl.load(place).to(tl.int64) + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    is_inside = (token < tl.load(place + 1))[:, None] & (column < HEAD)[None, :]
    x = tl.load(x_ptr + token[:, None] * token_stride + head * HEAD + column[None, :], mask=is_inside, other=0.0)
    peak = tl.max(tl.max(tl.abs(x.to(tl.float32)), 1), 0)
    tl.store(peaks_ptr + block * NUM_HEADS + head, peak)


@jit
def _quantize_heads_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    peaks_ptr,
    table_ptr,
    token_stride,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    place = table_ptr + block * COLUMNS
    token = tl.load(place).to(tl.int64) + tl.arange(0, BLOCK_N)
    first_block, num_blocks = tl.load(place + 2), tl.load(place + 3)
    peaks = tl.full((BLOCK_P,), 0.0, tl.float32)
    for start in range(0, num_blocks, BLOCK_P):
        other = start + tl.arange(0, BLOCK_P)
        peak_ptr = peaks_ptr + (first_block + other) * NUM_HEADS + head
        peaks = tl.maximum(peaks, tl.load(peak_ptr, mask=other < num_blocks, other=0.0))
    scale = tl.max(peaks, 0) * (1.0 / 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    if block == first_block:
        tl.store(scale_ptr + tl.load(place + 4) * NUM_HEADS + head, scale)
    column = tl.arange(0, BLOCK_D)
    is_inside = (token < tl.load(place + 1))[:, None] & (column < HEAD)[None, :]
    x = tl.load(x_ptr + token[:, None] * token_stride + head * HEAD + column[None, :], mask=is_inside, other=0.0)
    quotient = divided(x.to(tl.float32), scale, tl.div_rn(1.0, tl.maximum(scale, 2.0**-126)))
    quotient = tl.clamp(quotient, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    out_offset = token[:, None] * (NUM_HEADS * HEAD) + head * HEAD + column[None, :]
    tl.store(out_ptr + out_offset, quotient.to(tl.float8e4nv), mask=is_inside)


def launch_quantize_heads(x: Tensor, cu: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`reference_fp8.quantize_heads` by Triton; the heads of a token lie back to back, tokens may be apart."""
    num_tokens, num_heads, head_dim = x.shape
    assert x.stride(2) == 1
    assert x.stride(1) == head_dim or num_heads == 1
    assert num_tokens == cu[-1]
    out, scale = _empty(x, cu)
    table = _blocks(tuple(cu))
    num_blocks = len(table) // _COLUMNS
    if num_blocks == 0:
        return out, scale
    peaks = x.new_empty((num_blocks, num_heads), dtype=torch.float32)
    on_gpu, constants = on_device(table, x.device), _constants(num_heads, head_dim)
    grid = (num_heads, num_blocks)
    _head_peaks_kernel[grid](x, peaks, on_gpu, x.stride(0), **constants, num_warps=NUM_WARPS)
    _quantize_heads_kernel[grid](
        x, out, scale, peaks, on_gpu, x.stride(0), **constants, BLOCK_P=_BLOCK_PEAKS, num_warps=NUM_WARPS
    )
    return out, scale


def _empty(x: Tensor, cu: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For the results; a sequence without tokens has scale 1."""
    shape, has_empty = (len(cu) - 1, x.shape[1]), any(start == stop for start, stop in pairwise(cu))
    make = x.new_ones if has_empty else x.new_empty
    return torch.empty(x.shape, dtype=FP8, device=x.device), make(shape, dtype=torch.float32)


@lru_cache(maxsize=NUM_SHAPES)
def _blocks(cu: tuple[int, ...]) -> tuple[int, ...]:
    """For each block of tokens of one sequence: its first token and the end of the sequence, the sequence's first block
    and their number, and the sequence."""
    table, first_block = list[int](), 0
    for sequence, (start, stop) in enumerate(pairwise(cu)):
        tokens = range(start, stop, BLOCK_TOKENS)
        for first in tokens:
            table += (first, stop, first_block, len(tokens), sequence)
        first_block += len(tokens)
    return tuple(table)


def _constants(num_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "NUM_HEADS": num_heads,
        "HEAD": head_dim,
        "COLUMNS": _COLUMNS,
        "BLOCK_N": BLOCK_TOKENS,
        "BLOCK_D": block_of(head_dim),
    }


quantize_heads = operator(
    "quantize_heads(Tensor x, int[] cu) -> (Tensor, Tensor)",
    reference=reference_quantize_heads,
    kernel=launch_quantize_heads,
    shapes=_empty,
)


def specialisations(num_heads: int, head_dim: int) -> tuple[Specialisation, ...]:
    """What a transformer of that many heads launches in bfloat16."""
    types = {"x_ptr": "*bf16", "peaks_ptr": "*fp32", "table_ptr": "*i32", "token_stride": "i32"}
    constants = _constants(num_heads, head_dim)
    return (
        Specialisation(
            name="head_peaks", kernel=_head_peaks_kernel, types=types, constants=constants, num_warps=NUM_WARPS
        ),
        Specialisation(
            name="quantize_heads",
            kernel=_quantize_heads_kernel,
            types={**types, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
            constants={**constants, "BLOCK_P": _BLOCK_PEAKS},
            num_warps=NUM_WARPS,
            min_capability=90,
        ),
    )
