"""The public operations of the step path. Callers import them from here, so that a fused kernel can take the place of
its plain reference without a change to the model."""

from helios_serve.kernels.attention import Segments, attend, attention_scale
from helios_serve.kernels.fp8 import FP8, quantize_rows, scaled_linear
from helios_serve.kernels.reference import (
    conv3d,
    gated_residual,
    gated_residual_norm,
    gated_residual_split_norm,
    gelu_tanh,
    layer_norm,
    layer_norm_modulate,
    modulation_table,
    norm_rope,
    qk_norm_rope,
    residual_scatter_norm,
    rgb_to_yuv420,
    rms_norm,
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
