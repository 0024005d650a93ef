"""Attention by the libraries inside PyTorch: cuDNN, FlashAttention 2, the memory-efficient kernels, and plain products.

Operators of ATen are called by name, as the public function keeps the log-sum-exp to itself and chooses a library of
its own. Each takes all segments, or one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.attention.segments import Segments, on_device

AttendOne = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]
"""q [Nq, H, Dh], k, v [Nk, H, Dh], scale, key bias [Nk] -> out [Nq, H, Dh], lse [H, Nq]."""
_BIAS_ALIGNMENT = 16
"""The memory-efficient kernels read a bias in whole vectors, so its memory is filled up to this many values."""


def each_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend_one: AttendOne) -> tuple[Tensor, Tensor]:
    """One segment after the other."""
    scale, key_bias = segments.scale, segments.key_bias
    if segments.is_dense:
        return attend_one(q, k, v, scale, key_bias)
    out, lse = empty_results(q)
    for (q0, q1), (k0, k1) in zip(pairwise(segments.cu_q), pairwise(segments.cu_k), strict=True):
        if q0 == q1:
            continue
        bias = None if key_bias is None else key_bias[k0:k1]
        out[q0:q1], lse[:, q0:q1] = attend_one(q[q0:q1], k[k0:k1], v[k0:k1], scale, bias)
    return out, lse


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Of attention for the queries [Nq, H, Dh]: out like them, and lse [H, Nq]."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def attend_math(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The definition itself, on any device and in any dtype."""
    return each_segment(q, k, v, segments, reference.attend)


def attend_cpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention for CPUs."""
    return each_segment(q, k, v, segments, _one_on_cpu)


def _one_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, len(q), len(k))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), 0.0, False, attn_mask=mask, scale=scale
    )
    return out[0].transpose(0, 1), lse[0, :, : len(q)]


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention, dense, so that packs go segment by segment."""
    return each_segment(q, k, v, segments, _one_by_cudnn)


def _one_by_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    assert bias is None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True, 0.0, False, False, scale=scale
    )
    return out[0].transpose(0, 1), lse.reshape(q.shape[1], len(q))  # (1, H, Nq) or (1, H, Nq, 1)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention 2, all segments in one launch."""
    if segments.is_dense:
        dense = (x[None] for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *dense, None, None, len(q), len(k), 0.0, False, False, scale=segments.scale
        )
        return out[0], lse[0]
    cu_q, cu_k = (on_device(cu, q.device) for cu in (segments.cu_q, segments.cu_k))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, segments.max_q, segments.max_k, 0.0, False, False, scale=segments.scale
    )
    return out, lse


def attend_efficient(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """PyTorch's memory-efficient kernels, which also take float32 and a bias, which they want in the dtype of the
    queries; segment by segment."""
    return each_segment(q, k, v, segments, _one_efficient)


def _one_efficient(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = None
    if bias is not None:
        filled = F.pad(bias.to(q.dtype), (0, -len(bias) % _BIAS_ALIGNMENT))
        mask = filled[: len(bias)].expand(1, q.shape[1], len(q), len(k))
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *_heads_first(q, k, v), mask, True, scale=scale
    )
    return out[0].transpose(0, 1), lse[0, :, : len(q)]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[N, H, Dh] -> (1, H, N, Dh), as views."""
    return [x.transpose(0, 1)[None] for x in tensors]
