"""The one operator of attention: a trace sees `helios::attend`, whatever backend runs behind it.

Knows the operator's shape and cost; leaves the choice to `backends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from helios_serve.kernels.attention.backends import backend_for, backend_named
from helios_serve.kernels.attention.segments import Segments
from helios_serve.kernels.attention.torch_attention import empty_results
from helios_serve.kernels.launch import operator


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each segment, without padding.

    Args:
        q: [Nq, H, Dh]; k, v: [Nk, H, Dh], packed as `segments` says.

    Returns: out [Nq, H, Dh] in the dtype of `q`; lse [H, Nq] natural-log, float32 (float64 for float64 inputs).

    Raises: AttentionBackendError, if `segments` names a backend that does not exist or cannot do it.
    """
    out, lse = attend_packed(q, k, v, segments.cu_q, segments.cu_k, segments.scale, segments.key_bias, segments.backend)
    return out, lse


def _attend_by_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    key_bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    num_q, num_k = cu_q[-1], cu_k[-1]
    if num_q == 0:  # libraries do not check: the one for CPUs divides by it
        return empty_results(q)
    bias = None if key_bias is None else key_bias[:num_k]
    segments = Segments(cu_q=tuple(cu_q), cu_k=tuple(cu_k), scale=scale, key_bias=bias, backend=backend)
    chosen = backend_named(backend_for(q, segments))
    if num_q == len(q):
        return chosen.attend(q, k[:num_k], v[:num_k], segments)
    out, lse = empty_results(q)
    out[:num_q], lse[:, :num_q] = chosen.attend(q[:num_q], k[:num_k], v[:num_k], segments)
    return out, lse


attend_packed = operator(
    "attend(Tensor q, Tensor k, Tensor v, int[] cu_q, int[] cu_k, float scale, Tensor? key_bias, str backend) "
    "-> (Tensor, Tensor)",
    reference=_attend_by_backend,
    kernel=_attend_by_backend,
    shapes=lambda q, *_: empty_results(q),
)


@register_flop_formula(torch.ops.helios.attend)
def _attend_flops(
    q_shape: Sequence[int], _k: object, _v: object, cu_q: Sequence[int], cu_k: Sequence[int], *_: object, **_out: object
) -> int:
    """Two products of multiply and add for each pair of query and key."""
    pairs = sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True))
    return 4 * pairs * q_shape[1] * q_shape[2]
