"""Attention over packed segments behind one signature, whatever library computes it.

Knows tensors, segment bounds and backends; knows nothing of rotary embeddings, history or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from helios_serve.kernels import reference
from helios_serve.kernels.launch import operator


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Where each packed sequence begins and ends, for queries and for keys.

    `cu_q` and `cu_k` are running sums that begin with 0: segment i attends from rows cu_q[i]:cu_q[i+1] to rows
    cu_k[i]:cu_k[i+1]. They are host integers, so that no backend waits for the device. `key_bias` [Nk] float32 is
    added to the scaled logits.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    scale: float
    key_bias: Tensor | None = None

    @property
    def max_q(self) -> int:
        return max(stop - start for start, stop in pairwise(self.cu_q))

    @property
    def max_k(self) -> int:
        return max(stop - start for start, stop in pairwise(self.cu_k))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each segment, without padding.

    Args:
        q: [Nq, H, Dh]; k, v: [Nk, H, Dh], packed as `segments` says.

    Returns: out [Nq, H, Dh] in the dtype of `q`; lse [H, Nq] natural-log, float32 (float64 for float64 inputs).
    """
    out, lse = _attend(q, k, v, segments.cu_q, segments.cu_k, segments.scale, segments.key_bias)
    return out, lse


def _attend_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One segment after the other."""
    if len(cu_q) == 2:
        return _attend_one(q, k, v, scale, key_bias)
    out, lse = _empty_results(q)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        bias = None if key_bias is None else key_bias[k0:k1]
        out[q0:q1], lse[:, q0:q1] = _attend_one(q[q0:q1], k[k0:k1], v[k0:k1], scale, bias)
    return out, lse


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One segment by PyTorch's fused attention where it returns the log-sum-exp, else written out."""
    if q.device.type not in ("cpu", "cuda"):
        return reference.attend(q, k, v, scale, bias)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, H, N, Dh)
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, len(q), len(k))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        if mask is not None:
            mask = mask.expand(1, q.shape[1], len(q), len(k))
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads_first, mask, True, scale=scale)
    return out[0].transpose(0, 1), lse[0, :, : len(q)]


_attend = operator(
    "attend(Tensor q, Tensor k, Tensor v, int[] cu_q, int[] cu_k, float scale, Tensor? key_bias) -> (Tensor, Tensor)",
    reference=_attend_each,
    kernel=_attend_each,
    shapes=lambda q, *_: _empty_results(q),
)


@register_flop_formula(torch.ops.helios.attend)
def _attend_flops(
    q_shape: Sequence[int], _k: object, _v: object, cu_q: Sequence[int], cu_k: Sequence[int], *_: object, **_out: object
) -> int:
    """Two products of multiply and add for each pair of query and key."""
    pairs = sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True))
    return 4 * pairs * q_shape[1] * q_shape[2]


def attention_scale(head_dim: int) -> float:
    """The usual 1 / sqrt(Dh)."""
    return 1.0 / math.sqrt(head_dim)
