"""What makes and takes e4m3, in plain PyTorch: the modulated norms and GELU with a scale per row, each in the dtype of
`x`, then `quantize_rows` of it; heads with a scale per sequence, and attention between them.

Knows tensors only. Shape letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.fp8 import FP8, MAX_FP8, quantize_rows

WEIGHT_PEAK = 256.0
"""What the largest weight of a query becomes before weights are rounded to e4m3."""


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_tanh`, then `quantize_rows`: x [N, D] -> [N, D] e4m3 and [N, 1] float32."""
    return quantize_rows(reference.gelu_tanh(x))


def layer_norm_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate`, then `quantize_rows`: [N, D] e4m3 and [N, 1] float32."""
    return quantize_rows(reference.layer_norm_modulate(x, shift, scale, row, eps))


def gated_residual_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor, row: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`gated_residual_norm`, which changes `x`, then `quantize_rows`: [N, D] e4m3 and [N, 1] float32."""
    return quantize_rows(reference.gated_residual_norm(x, y, gate, row, shift, scale, eps))


def gated_residual_split_norm_fp8(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    row: Tensor,
    current_place: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed: Tensor,
    normed_scale: Tensor,
    current: Tensor,
    current_scale: Tensor,
) -> None:
    """`gated_residual_split_norm` into `normed` [N, D] and `current` [M, D], which are e4m3, with their scales [., 1]
    float32. What it leaves as it is, this leaves, too."""
    wide, wide_current = torch.empty_like(x), x.new_empty(current.shape)
    reference.gated_residual_split_norm(
        x, y, gate, row, current_place, shift, scale, weight, bias, eps, wide, wide_current
    )
    is_history = current_place < 0
    place = current_place[~is_history].long()
    normed[is_history], normed_scale[is_history] = quantize_rows(wide[is_history])
    current[place], current_scale[place] = quantize_rows(wide_current[place])


def residual_scatter_norm_fp8(
    x: Tensor,
    y: Tensor,
    index: Tensor,
    shift: Tensor,
    scale: Tensor,
    row: Tensor,
    eps: float,
    normed: Tensor,
    normed_scale: Tensor,
) -> None:
    """`residual_scatter_norm` into rows `index` [M] of `normed` [N, D] e4m3 and `normed_scale` [N, 1] float32."""
    wide = torch.empty_like(x)
    reference.residual_scatter_norm(x, y, index, shift, scale, row, eps, wide)
    normed[index], normed_scale[index] = quantize_rows(wide[index])


def quantize_heads(x: Tensor, cu: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rounds the heads of packed sequences to e4m3 so that the largest entry of a sequence's head becomes 448.

    Args:
        x: [N, H, Dh], any float dtype.
        cu: where sequences begin, running sums from 0 to N.

    Returns: [N, H, Dh] float8_e4m3fn and scale [sequences, H] float32, with x = result * scale; the scale of nothing
    but zeros is 1.
    """
    wide, out = x.float(), torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = x.new_ones((len(cu) - 1, x.shape[1]), dtype=torch.float32)
    for sequence, (start, stop) in enumerate(pairwise(cu)):
        if start == stop:
            continue
        peak = wide[start:stop].abs().amax((0, 2)) * (1 / MAX_FP8)
        scale[sequence] = torch.where(peak == 0, 1.0, peak)
        quotient = wide[start:stop] / scale[sequence][:, None]
        out[start:stop] = quotient.clamp(-MAX_FP8, MAX_FP8).to(FP8)
    return out, scale


def attend_fp8(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one segment in e4m3, as FlashAttention 3 rounds: weights too, behind a softmax whose sums are of
    unrounded ones.

    Args:
        q: [Nq, H, Dh] e4m3; k, v: [Nk, H, Dh] e4m3.
        scales: of q, k and v, each [H] float32.
        scale: factor of the logits.

    Returns: out [Nq, H, Dh] bfloat16, lse [H, Nq] float32.
    """
    q_scale, k_scale, v_scale = scales
    logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (q_scale * k_scale * scale)[:, None, None]
    peak = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1)
    rounded = (weights * WEIGHT_PEAK).to(FP8).float()
    out = torch.einsum("hqk,khd->qhd", rounded, v.float()) * (v_scale[:, None] / WEIGHT_PEAK)
    return (out / total.T[..., None]).bfloat16(), peak[..., 0] + total.log()
