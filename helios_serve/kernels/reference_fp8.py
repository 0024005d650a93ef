"""The modulated norms and GELU with e4m3 results and a scale per row, in plain PyTorch: each in the dtype of `x`, then
`quantize_rows` of it.

Knows tensors only. Shape letters as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.fp8 import quantize_rows


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
