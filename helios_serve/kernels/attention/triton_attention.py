"""Attention over packed segments as one Triton kernel, with log-sum-exp and an optional bias of each key.

One program per block of queries and head walks over the keys of its segment: whole blocks first, without a mask, then
the cut one. A table in device memory tells each program its rows; it is made once per packed shape. Logits are kept in
base 2. Keys of all blocks of a head are read in a row, so that they stay in the L2 cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from helios_serve.kernels.attention.segments import NUM_SHAPES, Segments, on_device
from helios_serve.kernels.attention.torch_attention import empty_results
from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, tl, tuned

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 256
_TABLE_WIDTH = 4  # first and last row of the queries, first and last row of the keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the work is cut: rows of queries and of keys in a block, warps of a program, blocks of keys in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


CANDIDATES = (
    Tiles(queries=128, keys=128, num_warps=8, num_stages=2),
    Tiles(queries=128, keys=128, num_warps=8, num_stages=3),
    Tiles(queries=128, keys=64, num_warps=8, num_stages=3),
    Tiles(queries=128, keys=64, num_warps=8, num_stages=4),
    Tiles(queries=64, keys=64, num_warps=4, num_stages=3),
)
"""For tuning heads of 65 to 128 in 16 bits from sm_90 on."""
_PLAIN = Tiles(queries=32, keys=32, num_warps=4, num_stages=1)
_BY_CAPABILITY = {
    80: (Tiles(queries=128, keys=32, num_warps=8, num_stages=3), Tiles(queries=64, keys=32, num_warps=8, num_stages=1)),
    90: (CANDIDATES[0], Tiles(queries=128, keys=32, num_warps=8, num_stages=2)),
    100: (CANDIDATES[2], Tiles(queries=64, keys=64, num_warps=8, num_stages=2)),
}
"""For heads of up to 128 and of up to 256: what fits into registers and shared memory."""


def default_tiles(head_block: int, itemsize: int, capability: int, *, is_biased: bool = False) -> Tiles:
    """Where nothing was tuned, on sm_`capability`. 32 bits and more are there for comparison and not fast."""
    if itemsize > 2:
        return _PLAIN
    if is_biased and capability >= 90 and head_block <= 128:
        return CANDIDATES[2]  # the bias takes registers
    generation = max((known for known in _BY_CAPABILITY if known <= capability), default=80)
    return _BY_CAPABILITY[generation][head_block > 128]


def tiles_for(q: Tensor, *, is_biased: bool) -> Tiles:
    """As measured on devices of that name (table `attention_tiles`, by head block), else `default_tiles`."""
    head_block = head_block_of(q.shape[2])
    found = tuned("attention_tiles", q.device).get(str(head_block))
    if found is not None and q.itemsize == 2 and not is_biased:
        return Tiles(**found)
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    return default_tiles(head_block, q.itemsize, 10 * major + minor, is_biased=is_biased)


def head_block_of(head_dim: int) -> int:
    """Columns that a program holds of a head: at least 16, as a matrix product needs."""
    return max(16, block_of(head_dim))


@jit
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    out_stride,
    out_head_stride,
    lse_head_stride,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    IS_BIASED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SCALE: of the logits in base 2."""
    entry = table_ptr + tl.program_id(0) * 4
    head = tl.program_id(1).to(tl.int64)
    q_start, q_stop = tl.load(entry).to(tl.int64), tl.load(entry + 1)
    k_start, k_stop = tl.load(entry + 2).to(tl.int64), tl.load(entry + 3).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    is_row = rows < q_stop - q_start
    is_inside = is_row[:, None] & (columns < D)[None, :]
    q_ptrs = q_ptr + q_start * q_stride + head * q_head_stride + rows[:, None] * q_stride + columns[None, :]
    q = tl.load(q_ptrs, mask=is_inside, other=0.0)
    peak = tl.full((BLOCK_M,), -float("inf"), WIDE)
    total = tl.full((BLOCK_M,), 0.0, WIDE)
    out = tl.full((BLOCK_M, BLOCK_D), 0.0, WIDE)
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    whole_stop = k_start + (k_stop - k_start) // BLOCK_N * BLOCK_N
    for start in range(k_start, whole_stop, BLOCK_N):
        peak, total, out = _attend_to_block(
            q, peak, total, out, k_ptr, v_ptr, bias_ptr, k_stride, v_stride, start, k_stop,
            D, SCALE, IS_BIASED, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if whole_stop < k_stop:
        peak, total, out = _attend_to_block(
            q, peak, total, out, k_ptr, v_ptr, bias_ptr, k_stride, v_stride, whole_stop, k_stop,
            D, SCALE, IS_BIASED, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a segment without keys
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head * lse_head_stride + q_start + rows, lse, mask=is_row)
    out_ptrs = out_ptr + q_start * out_stride + head * out_head_stride + rows[:, None] * out_stride + columns[None, :]
    tl.store(out_ptrs, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_inside)


@jit
def _attend_to_block(
    q,
    peak,
    total,
    out,
    k_ptr,
    v_ptr,
    bias_ptr,
    k_stride,
    v_stride,
    start,
    stop,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    IS_BIASED: tl.constexpr,
    IS_CUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums after the keys `start` to `stop`, of which a block is taken. IS_CUT: the block reaches beyond them."""
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    is_key = keys < stop - start
    k_ptrs = k_ptr + start * k_stride + keys[:, None] * k_stride + columns[None, :]
    v_ptrs = v_ptr + start * v_stride + keys[:, None] * v_stride + columns[None, :]
    if IS_CUT or D != BLOCK_D:
        is_inside = is_key[:, None] & (columns < D)[None, :]
        k = tl.load(k_ptrs, mask=is_inside, other=0.0)
        v = tl.load(v_ptrs, mask=is_inside, other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    if IS_BIASED:
        bias = tl.load(bias_ptr + start + keys, mask=is_key, other=0.0).to(logits.dtype)
        logits += (bias * 1.4426950408889634)[None, :]
    if IS_CUT:
        logits = tl.where(is_key[None, :], logits, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    origin = new_peak
    if IS_BIASED:
        origin = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # all keys so far are shut out
    weights = tl.exp2(logits - origin[:, None])
    decay = tl.exp2(peak - origin)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee", out_dtype=out.dtype)
    return new_peak, total, out


def attend_triton(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """`launch_attend` into memory of its own."""
    out, lse = empty_results(q)
    launch_attend(q, k, v, segments, out, lse)
    return out, lse


def launch_attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, out: Tensor, lse: Tensor, tiles: Tiles | None = None
) -> None:
    """All segments in one launch.

    Args:
        q: [Nq, H, Dh]; k, v: [Nk, H, Dh]; any strides but for the last, which is 1.
        out: [Nq, H, Dh] and lse: [H, Nq], which are written; rows behind the last segment are left as they are.
        tiles: `tiles_for` unless given.
    """
    num_heads, head_dim = q.shape[1:]
    assert q.stride(2) == k.stride(2) == v.stride(2) == out.stride(2) == lse.stride(1) == 1
    is_biased = segments.key_bias is not None
    tiles = tiles_for(q, is_biased=is_biased) if tiles is None else tiles
    table = block_table(segments.cu_q, segments.cu_k, tiles.queries)
    _attend_kernel[(len(table) // _TABLE_WIDTH, num_heads)](
        q,
        k,
        v,
        None if segments.key_bias is None else segments.key_bias.contiguous(),
        out,
        lse,
        on_device(table, q.device),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        lse.stride(0),
        D=head_dim,
        SCALE=segments.scale * LOG2_E,
        IS_BIASED=is_biased,
        WIDE=accumulator(q),
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        BLOCK_D=head_block_of(head_dim),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )


@lru_cache(maxsize=NUM_SHAPES)
def block_table(cu_q: tuple[int, ...], cu_k: tuple[int, ...], num_queries: int) -> tuple[int, ...]:
    """For each block of at most `num_queries` rows of one segment: its first row and the end of the segment, then the
    first and the last row of its keys. Blocks with the most keys come first, as they take longest."""
    segments = sorted(zip(pairwise(cu_q), pairwise(cu_k), strict=True), key=lambda bounds: bounds[1][0] - bounds[1][1])
    return tuple(
        value
        for (q_start, q_stop), (k_start, k_stop) in segments
        for first in range(q_start, q_stop, num_queries)
        for value in (first, q_stop, k_start, k_stop)
    )


def specialisations(head_dim: int) -> tuple[Specialisation, ...]:
    """What a transformer with heads of that size launches in bfloat16 on each generation of devices, with and without
    a bias, and on sm_90 with every candidate too."""
    head_block = head_block_of(head_dim)
    launched = [
        (default_tiles(head_block, 2, capability, is_biased=is_biased), capability, is_biased)
        for capability in _BY_CAPABILITY
        for is_biased in (False, True)
    ]
    others = [
        (tiles, 90, False) for tiles in CANDIDATES if head_block == 128 and tiles != default_tiles(head_block, 2, 90)
    ]
    return tuple(_specialisation(head_dim, *one) for one in (*launched, *others))


def _specialisation(head_dim: int, tiles: Tiles, capability: int, is_biased: bool) -> Specialisation:
    shape = f"{tiles.queries}x{tiles.keys}x{head_dim}_{tiles.num_warps}w{tiles.num_stages}s"
    strides = ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride")
    return Specialisation(
        name=f"attend_{shape}_sm{capability}" + "_biased" * is_biased,
        kernel=_attend_kernel,
        types={
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
            **dict.fromkeys((*strides, "out_stride", "out_head_stride", "lse_head_stride"), "i32"),
            **({"bias_ptr": "*fp32"} if is_biased else {}),
            "lse_ptr": "*fp32",
            "table_ptr": "*i32",
        },
        constants={
            **({} if is_biased else {"bias_ptr": None}),
            "D": head_dim,
            "SCALE": head_dim**-0.5 * LOG2_E,
            "IS_BIASED": is_biased,
            "WIDE": tl.float32,
            "BLOCK_M": tiles.queries,
            "BLOCK_N": tiles.keys,
            "BLOCK_D": head_block_of(head_dim),
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        min_capability=capability,
        max_capability=capability,
    )
