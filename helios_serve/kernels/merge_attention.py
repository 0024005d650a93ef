"""Merges attention of the same queries over two disjoint sets of keys, as ring attention does after each exchange.

One program per block of tokens and head reads both results once and writes the merged one once. Sums are wide whatever
the inputs are, so that a ring of many parts rounds only at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, operator, tl

BLOCK_TOKENS = 16
NUM_WARPS = 4


def merge_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `merge_attention`, in plain PyTorch."""
    lse = torch.logaddexp(lse_a, lse_b)
    origin = torch.where(lse == -torch.inf, 0.0, lse)  # neither set has keys: nothing plus nothing
    weight_a, weight_b = ((part - origin).exp().T.contiguous()[..., None] for part in (lse_a, lse_b))
    return weight_a * out_a.to(lse.dtype) + weight_b * out_b.to(lse.dtype), lse


@jit
def _merge_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_tokens,
    out_a_stride,
    out_a_head_stride,
    lse_a_stride,
    lse_a_head_stride,
    out_b_stride,
    out_b_head_stride,
    lse_b_stride,
    lse_b_head_stride,
    out_stride,
    out_head_stride,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    is_token = tokens < num_tokens
    is_inside = is_token[:, None] & (columns < D)[None, :]
    lse_a = tl.load(lse_a_ptr + head * lse_a_head_stride + tokens * lse_a_stride, mask=is_token, other=0.0)
    lse_b = tl.load(lse_b_ptr + head * lse_b_head_stride + tokens * lse_b_stride, mask=is_token, other=0.0)
    peak = tl.maximum(lse_a, lse_b)
    origin = tl.where(peak == -float("inf"), 0.0, peak)
    weight_a = tl.exp(lse_a - origin)
    weight_b = tl.exp(lse_b - origin)
    total = weight_a + weight_b
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + head * num_tokens + tokens, peak + tl.log(total), mask=is_token)
    a_ptrs = out_a_ptr + tokens[:, None] * out_a_stride + head * out_a_head_stride + columns[None, :]
    b_ptrs = out_b_ptr + tokens[:, None] * out_b_stride + head * out_b_head_stride + columns[None, :]
    out_a = tl.load(a_ptrs, mask=is_inside, other=0.0).to(WIDE)
    out_b = tl.load(b_ptrs, mask=is_inside, other=0.0).to(WIDE)
    out = out_a * (weight_a / total)[:, None] + out_b * (weight_b / total)[:, None]
    out_ptrs = out_ptr + tokens[:, None] * out_stride + head * out_head_stride + columns[None, :]
    tl.store(out_ptrs, out, mask=is_inside)


def launch_merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_reference` by Triton; any strides but for the last of both results, which is 1."""
    num_tokens, num_heads, head_dim = out_a.shape
    assert out_a.stride(2) == out_b.stride(2) == 1
    out, lse = _empty_merged(out_a, lse_a)
    _merge_kernel[((num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS, num_heads)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        lse,
        num_tokens,
        *out_a.stride()[:2],
        *lse_a.stride()[::-1],
        *out_b.stride()[:2],
        *lse_b.stride()[::-1],
        *out.stride()[:2],
        D=head_dim,
        WIDE=accumulator(lse_a),
        BLOCK_M=BLOCK_TOKENS,
        BLOCK_D=block_of(head_dim),
        num_warps=NUM_WARPS,
    )
    return out, lse


def _empty_merged(out_a: Tensor, lse_a: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(out_a.shape, dtype=lse_a.dtype, device=out_a.device)
    return out, torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)


merge_packed = operator(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    reference=merge_reference,
    kernel=launch_merge_attention,
    shapes=_empty_merged,
)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, from attention over the keys of each.

    Args:
        out_a, out_b: [N, H, Dh], of any float dtypes.
        lse_a, lse_b: [H, N] natural-log, both float32 (float64 for float64 inputs); -inf where there are no keys.

    Returns: out [N, H, Dh] and lse [H, N], both in the dtype of the log-sum-exps. A ring goes on with that `out` and
    rounds it once, at its end. Formula: FlashAttention's rescaling, as in Liu et al., Ring Attention (2023).
    """
    out, lse = merge_packed(out_a, lse_a, out_b, lse_b)
    return out, lse


def specialisations(head_dim: int) -> tuple[Specialisation, ...]:
    """What a ring launches for heads of that size: a wide sum and a part in bfloat16."""
    strides = ("out_a_stride", "out_a_head_stride", "lse_a_head_stride", "out_b_stride", "out_b_head_stride")
    return (
        Specialisation(
            name="merge_attention",
            kernel=_merge_kernel,
            types={
                **dict.fromkeys(("out_a_ptr", "lse_a_ptr", "lse_b_ptr", "out_ptr", "lse_ptr"), "*fp32"),
                **dict.fromkeys((*strides, "lse_b_head_stride", "out_stride", "out_head_stride", "num_tokens"), "i32"),
                "out_b_ptr": "*bf16",
            },
            constants={
                "lse_a_stride": 1,
                "lse_b_stride": 1,
                "D": head_dim,
                "WIDE": tl.float32,
                "BLOCK_M": BLOCK_TOKENS,
                "BLOCK_D": block_of(head_dim),
            },
            num_warps=NUM_WARPS,
        ),
    )
