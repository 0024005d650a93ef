"""The public operations of the step path. Callers import them from here and need not know which of them are fused
kernels on the device at hand."""

from helios_serve.kernels.adaln_norm import (
    gated_residual_norm,
    gated_residual_split_norm,
    layer_norm,
    layer_norm_modulate,
    residual_scatter_norm,
)
from helios_serve.kernels.attention import Segments, attend, attention_scale
from helios_serve.kernels.fp8 import FP8, quantize_rows, scaled_linear
from helios_serve.kernels.gelu import linear_gelu
from helios_serve.kernels.qk_norm_rope import norm_rope, qk_norm_rope, rms_norm
from helios_serve.kernels.reference import (
    conv3d,
    gated_residual,
    gelu_tanh,
    modulation_table,
    rgb_to_yuv420,
    rms_norm_silu,
    to_uint8,
    vae_rms_norm,
)

__all__ = [
    "FP8",
    "Segments",
    "attend",
    "attention_scale",
    "conv3d",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_split_norm",
    "gelu_tanh",
    "layer_norm",
    "layer_norm_modulate",
    "linear_gelu",
    "modulation_table",
    "norm_rope",
    "qk_norm_rope",
    "quantize_rows",
    "residual_scatter_norm",
    "rgb_to_yuv420",
    "rms_norm",
    "rms_norm_silu",
    "scaled_linear",
    "to_uint8",
    "vae_rms_norm",
]
