"""e4m3 matrix products with a scale per row of the activations and per row of the weight.

Knows tensors only. The product is PyTorch's on every device; the rounding is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0
"""The largest number of e4m3 without infinities."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to e4m3 so that its largest entry becomes 448.

    Args:
        x: [N, D], any float dtype.

    Returns: rows [N, D] float8_e4m3fn and scale [N, 1] float32, with x = rows * scale; the scale of a zero row is 1.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) * (1 / MAX_FP8)  # a CUDA device would divide so
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale).clamp(-MAX_FP8, MAX_FP8).to(FP8), scale


def scaled_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """`(x * x_scale) @ (weight * weight_scale).T + bias` with float32 sums.

    Args:
        x: [N, K] e4m3; x_scale [N, 1] float32.
        weight: [M, K] e4m3; weight_scale [M, 1] float32; K and M are multiples of 16.
        bias: [M] in the dtype of the result.

    Returns: [N, M].
    """
    product: Tensor = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t().contiguous(),
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=x.device.type == "cuda",
    )
    return product
