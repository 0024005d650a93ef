"""Self-attention in e4m3, an approximation: queries, keys and values are rounded with a scale for each sequence and
head.

By FlashAttention 3 on Hopper, and step by step in float32 on a CPU, for tests. Knows how segments are rounded and
handed over; results are in the dtype of the queries.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from helios_serve.kernels import reference_fp8
from helios_serve.kernels.attention.library_attention import run_fa3
from helios_serve.kernels.attention.quantize_heads import quantize_heads
from helios_serve.kernels.attention.segments import Segments
from helios_serve.kernels.attention.torch_attention import empty_results


def attend_fa3_fp8(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """FlashAttention 3, which also rounds its weights to e4m3 and returns bfloat16."""
    rounded, scales = _rounded(q, k, v, segments)
    out, lse = run_fa3(*rounded, segments, scales)
    return out.to(q.dtype), lse


def attend_math_fp8(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """What `attend_fa3_fp8` rounds, written out."""
    (q8, k8, v8), scales = _rounded(q, k, v, segments)
    out, lse = empty_results(q)
    bounds = zip(pairwise(segments.cu_q), pairwise(segments.cu_k), strict=True)
    for sequence, ((q0, q1), (k0, k1)) in enumerate(bounds):
        own = (scales[0][sequence], scales[1][sequence], scales[2][sequence])
        out[q0:q1], lse[:, q0:q1] = reference_fp8.attend_fp8(q8[q0:q1], k8[k0:k1], v8[k0:k1], own, segments.scale)
    return out, lse


def _rounded(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """All three in e4m3, and their scales, each [sequences, H] float32."""
    q8, q_scale = quantize_heads(q, segments.cu_q)
    k8, k_scale = quantize_heads(k, segments.cu_k)
    v8, v_scale = quantize_heads(v, segments.cu_k)
    return (q8, k8, v8), (q_scale, k_scale, v_scale)
