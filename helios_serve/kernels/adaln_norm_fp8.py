"""The modulated norms with e4m3 results, so that a row is quantised in the pass that computes it.

The kernels are those of `adaln_norm`; the results and their scales are what `scaled_linear` takes.
"""

from __future__ import annotations

from torch import Tensor

from helios_serve.kernels import reference_fp8
from helios_serve.kernels.adaln_norm import launch_norm, launch_residual, launch_scatter
from helios_serve.kernels.launch import operator
from helios_serve.kernels.quantize_rows import empty_rows


def launch_layer_norm_modulate_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference_fp8.layer_norm_modulate_fp8` by Triton."""
    out, row_scale = empty_rows(x)
    launch_norm(x, shift, scale, row, eps, out, row_scale)
    return out, row_scale


def launch_gated_residual_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor, row: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference_fp8.gated_residual_norm_fp8` by Triton."""
    normed, normed_scale = empty_rows(x)
    launch_residual(x, y, gate, row, None, shift, scale, None, None, eps, normed, normed_scale, None, None)
    return normed, normed_scale


layer_norm_modulate_fp8 = operator(
    "layer_norm_modulate_fp8(Tensor x, Tensor shift, Tensor scale, Tensor row, float eps) -> (Tensor, Tensor)",
    reference=reference_fp8.layer_norm_modulate_fp8,
    kernel=launch_layer_norm_modulate_fp8,
    shapes=lambda x, *_: empty_rows(x),
)
gated_residual_norm_fp8 = operator(
    "gated_residual_norm_fp8(Tensor(a!) x, Tensor y, Tensor gate, Tensor row, Tensor shift, Tensor scale, float eps) "
    "-> (Tensor, Tensor)",
    reference=reference_fp8.gated_residual_norm_fp8,
    kernel=launch_gated_residual_norm_fp8,
    shapes=lambda x, *_: empty_rows(x),
)
gated_residual_split_norm_fp8 = operator(
    "gated_residual_split_norm_fp8(Tensor(a!) x, Tensor y, Tensor gate, Tensor row, Tensor current_place, "
    "Tensor shift, Tensor scale, Tensor weight, Tensor bias, float eps, Tensor(b!) normed, Tensor(c!) normed_scale, "
    "Tensor(d!) current, Tensor(e!) current_scale) -> ()",
    reference=reference_fp8.gated_residual_split_norm_fp8,
    kernel=launch_residual,
    shapes=lambda *_: None,
)
residual_scatter_norm_fp8 = operator(
    "residual_scatter_norm_fp8(Tensor(a!) x, Tensor y, Tensor index, Tensor shift, Tensor scale, Tensor row, "
    "float eps, Tensor(b!) normed, Tensor(c!) normed_scale) -> ()",
    reference=reference_fp8.residual_scatter_norm_fp8,
    kernel=launch_scatter,
    shapes=lambda *_: None,
)
