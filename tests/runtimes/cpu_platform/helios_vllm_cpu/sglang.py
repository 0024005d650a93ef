"""What SGLang-Diffusion loads in each of its processes: an operator that its own Helios backend needs on a processor,
and a count of the work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from helios_vllm_cpu import work

_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")
"""Kept alive here: an operator goes with its library."""


def begin() -> None:
    """Prepares this process for a machine without an accelerator, and for tests that count its work."""
    _LIBRARY.define(
        "fused_norm_scale_shift_cpu("
        "Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, str norm_type, float eps) -> Tensor"
    )
    _LIBRARY.impl("fused_norm_scale_shift_cpu", _norm_scale_shift, "CPU")
    work.count()


def _norm_scale_shift(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, norm_type: str, eps: float
) -> Tensor:
    """What SGLang's kernel of this name computes, in float32; `sglang-kernel` has it, which is built for CUDA.

    Args:
        x: [B, L, C].
        scale, shift: [B, L, C], or what spreads to that.
    """
    assert norm_type == "layer"
    normed = layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return (normed * (1 + scale) + shift).to(x.dtype)
