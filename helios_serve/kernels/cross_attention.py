"""Attention from packed queries to the prompts of their requests, each read where it was projected to.

One program per block of queries, head and request. A device table of addresses says where a request's keys and values
lie, so that nothing is copied together for a pack and a captured graph follows a table that was written anew. The last
key of a prompt may stand for several equal ones. Knows tensors and segments; knows nothing of text encoders or caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from helios_serve.kernels import reference_cross
from helios_serve.kernels.attention import Segments, attend
from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, operator, tl, tuned

NUM_COLUMNS = 6
"""Of the table: first query, end of the queries, number of keys, repeats of the last one, addresses of keys and
values."""
MIN_BLOCK = 16
"""The smallest side of a matrix product."""
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedText:
    """The prompts of packed queries, in their order; queries cu_q[i]:cu_q[i+1] attend to prompt i.

    keys, values: of each prompt for all layers, [layers, L, H, Dh] contiguous. repeats: how many equal keys the last
    one stands for. places: what `places_of` says, on a CUDA device; None elsewhere.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    repeats: tuple[int, ...]
    cu_q: tuple[int, ...]
    scale: float
    places: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Queries and keys of a tile, warps of a program, and how many tiles of keys are in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CONFIGS = (
    Config(block_m=64, block_n=32, num_warps=4, num_stages=2),
    Config(block_m=64, block_n=64, num_warps=4, num_stages=2),
    Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    Config(block_m=128, block_n=32, num_warps=8, num_stages=2),
    Config(block_m=128, block_n=64, num_warps=8, num_stages=1),
    Config(block_m=64, block_n=64, num_warps=4, num_stages=1),
)
"""Candidates for tuning in 16-bit types; the first is the default, the fastest on an H100."""
WIDE_CONFIG = Config(block_m=32, block_n=32, num_warps=8, num_stages=1)
"""For float32, whose products are not rounded to fewer bits: larger tiles do not fit into registers."""


def cross_attend(q: Tensor, text: PackedText, layer: int) -> Tensor:
    """`reference_cross.cross_attend` on any device: [M, H, Dh] -> [M, H, Dh]."""
    out: Tensor = _cross_attend(q, text.keys, text.values, layer, text.cu_q, text.repeats, text.scale, text.places)
    return out


def places_of(keys: Sequence[Tensor], values: Sequence[Tensor], cu_q: Sequence[int], repeats: Sequence[int]) -> Tensor:
    """The table that the kernel reads: [layers, prompts, NUM_COLUMNS] int64 in host memory.

    It holds addresses: keep the tensors for as long as it is read.
    """
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (*keys, *values))
    first_layer, layer_bytes = [], []
    for (start, stop), key, value, repeat in zip(pairwise(cu_q), keys, values, repeats, strict=True):
        first_layer.append((start, stop, key.shape[1], repeat, key.data_ptr(), value.data_ptr()))
        layer_bytes.append((0, 0, 0, 0, key[0].nbytes, value[0].nbytes))
    host = torch.device("cpu")
    layer = torch.arange(len(keys[0]), device=host)[:, None, None]
    return torch.tensor(first_layer, device=host) + layer * torch.tensor(layer_bytes, device=host)


@jit
def _cross_attention_kernel(
    q_ptr,
    out_ptr,
    table_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = table_ptr + tl.program_id(2) * COLUMNS
    first = tl.load(place) + tl.program_id(1) * BLOCK_M
    num_queries = (tl.load(place + 1) - first).to(tl.int32)
    if num_queries <= 0:  # the grid fits the longest segment
        return
    num_keys = tl.load(place + 2).to(tl.int32)
    last_bias = tl.log2(tl.load(place + 3).to(WIDE))
    key_ptr = tl.load(place + 4).to(q_ptr.dtype)
    value_ptr = tl.load(place + 5).to(q_ptr.dtype)

    column = tl.arange(0, BLOCK_D)
    is_inside = column < HEAD
    query = tl.arange(0, BLOCK_M)
    q_offset = query[:, None] * (NUM_HEADS * HEAD) + column[None, :]
    is_query = (query < num_queries)[:, None] & is_inside[None, :]
    block_start = first * (NUM_HEADS * HEAD) + tl.program_id(0) * HEAD
    q = tl.load(q_ptr + block_start + q_offset, mask=is_query, other=0.0)

    token = tl.arange(0, BLOCK_N)
    kv_offset = token[:, None] * (NUM_HEADS * HEAD) + tl.program_id(0) * HEAD + column[None, :]
    largest = tl.full((BLOCK_M,), float("-inf"), WIDE)
    total = tl.full((BLOCK_M,), 0.0, WIDE)
    summed = tl.full((BLOCK_M, BLOCK_D), 0.0, WIDE)
    for start in range(0, num_keys, BLOCK_N):
        is_key = start + token < num_keys
        mask = is_key[:, None] & is_inside[None, :]
        offset = start * (NUM_HEADS * HEAD) + kv_offset
        keys = tl.load(tl.multiple_of(key_ptr + offset, [ALIGNMENT, ALIGNMENT]), mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=WIDE) * LOG2_SCALE
        logits += tl.where(start + token == num_keys - 1, last_bias, 0.0)[None, :]
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        share = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(share, 1)
        values = tl.load(tl.multiple_of(value_ptr + offset, [ALIGNMENT, ALIGNMENT]), mask=mask, other=0.0)
        summed = summed * shrink[:, None]
        summed += tl.dot(share.to(values.dtype), values, input_precision=PRECISION, out_dtype=WIDE)
        largest = higher
    out = summed / total[:, None]
    tl.store(out_ptr + block_start + q_offset, out.to(out_ptr.dtype.element_ty), mask=is_query)


def launch_cross_attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layer: int,
    cu_q: Sequence[int],
    repeats: Sequence[int],
    scale: float,
    places: Tensor | None,
) -> Tensor:
    """`reference_cross.cross_attend` by Triton; it makes `places` itself if it is None."""
    if q.dtype == torch.float64 and q.is_cuda:  # nobody serves it, and Triton's releases differ in whether they can
        return reference_cross.cross_attend(q, keys, values, layer, cu_q, repeats, scale, places)
    assert q.is_contiguous()
    assert {x.dtype for x in (*keys, *values)} == {q.dtype}
    table = places_of(keys, values, cu_q, repeats).to(q.device) if places is None else places
    out = torch.empty_like(q)
    _, num_heads, head_dim = q.shape
    config = config_for(q)
    num_blocks = max(-(-(stop - start) // config.block_m) for start, stop in pairwise(cu_q))
    # Neighbouring programs are the heads of the same queries, which lie side by side in memory.
    _cross_attention_kernel[(num_heads, num_blocks, len(keys))](
        q,
        out,
        table[layer],
        **_constants(num_heads, head_dim, scale, q.itemsize, config),
        WIDE=accumulator(q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def config_for(q: Tensor) -> Config:
    """As measured on devices of that name, else the first candidate."""
    if q.itemsize > 2:
        return WIDE_CONFIG
    measured = tuned("cross_attention", q.device)
    return Config(**measured) if measured else CONFIGS[0]


def _constants(num_heads: int, head_dim: int, scale: float, itemsize: int, config: Config) -> dict[str, Any]:
    return {
        "NUM_HEADS": num_heads,
        "HEAD": head_dim,
        "LOG2_SCALE": scale * _LOG2_E,
        "COLUMNS": NUM_COLUMNS,
        "ALIGNMENT": math.gcd(16, head_dim * itemsize),
        "PRECISION": "ieee" if itemsize > 2 else "tf32",  # it says nothing about 16-bit types
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(MIN_BLOCK, block_of(head_dim)),
    }


def _attend_each(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layer: int,
    cu_q: Sequence[int],
    repeats: Sequence[int],
    scale: float,
    places: Tensor | None,
) -> Tensor:
    """One segment after the other by plain attention, where every key stands for itself."""
    if any(repeat != 1 for repeat in repeats):
        return reference_cross.cross_attend(q, keys, values, layer, cu_q, repeats, scale, places)
    parts = []
    for (start, stop), key, value in zip(pairwise(cu_q), keys, values, strict=True):
        segment = Segments(cu_q=(0, stop - start), cu_k=(0, key.shape[1]), scale=scale)
        parts.append(attend(q[start:stop], key[layer], value[layer], segment)[0])
    return torch.cat(parts)


_cross_attend = operator(
    "cross_attend(Tensor q, Tensor[] keys, Tensor[] values, int layer, int[] cu_q, int[] repeats, float scale, "
    "Tensor? places) -> Tensor",
    reference=_attend_each,
    kernel=launch_cross_attend,
    shapes=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
)


@register_flop_formula(torch.ops.helios.cross_attend)
def _cross_attend_flops(
    q_shape: Sequence[int],
    key_shapes: Sequence[Sequence[int]],
    _values: object,
    _layer: int,
    cu_q: Sequence[int],
    *_: object,
    **_out: object,
) -> int:
    """Two products of multiply and add for each pair of query and key."""
    pairs = sum((stop - start) * shape[1] for (start, stop), shape in zip(pairwise(cu_q), key_shapes, strict=True))
    return 4 * pairs * q_shape[1] * q_shape[2]


def specialisations(num_heads: int, head_dim: int) -> tuple[Specialisation, ...]:
    """What a transformer of that many heads launches in bfloat16, with every candidate, and in float32."""
    choices = (
        *(("cross_attention", config, "*bf16", 2) for config in CONFIGS),
        ("wide_cross", WIDE_CONFIG, "*fp32", 4),
    )
    return tuple(
        Specialisation(
            name=f"{name}_{config.block_m}x{config.block_n}_{config.num_warps}w{config.num_stages}s",
            kernel=_cross_attention_kernel,
            types={"q_ptr": kind, "out_ptr": kind, "table_ptr": "*i64"},
            constants={**_constants(num_heads, head_dim, head_dim**-0.5, itemsize, config), "WIDE": tl.float32},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        for name, config, kind, itemsize in choices
    )
