"""The public operations of the step path. Callers import them from here and need not know which of them are fused
kernels on the device at hand."""

from helios_serve.kernels.adaln_norm import (
    gated_residual_norm,
    gated_residual_split_norm,
    layer_norm,
    layer_norm_modulate,
    residual_scatter_norm,
)
from helios_serve.kernels.adaln_norm_fp8 import (
    gated_residual_norm_fp8,
    gated_residual_split_norm_fp8,
    layer_norm_modulate_fp8,
    residual_scatter_norm_fp8,
)
from helios_serve.kernels.attention import Segments, attend, attention_scale
from helios_serve.kernels.cross_attention import PackedText, cross_attend
from helios_serve.kernels.fp8 import FP8, scaled_linear
from helios_serve.kernels.gelu import linear_gelu
from helios_serve.kernels.merge_attention import merge_attention
from helios_serve.kernels.qk_norm_rope import norm_rope, qk_norm_rope, rms_norm
from helios_serve.kernels.quantize_rows import gelu_quantize_rows, quantize_rows
from helios_serve.kernels.reference import (
    conv3d,
    gated_residual,
    gelu_tanh,
    modulation_table,
    rms_norm_silu,
    vae_rms_norm,
)
from helios_serve.kernels.vae_epilogue import add_bias, convolve, place_with_bias
from helios_serve.kernels.vae_norm_silu import norm_rows
from helios_serve.kernels.yuv import rgb_to_yuv420, to_uint8

__all__ = [
    "FP8",
    "PackedText",
    "Segments",
    "add_bias",
    "attend",
    "attention_scale",
    "conv3d",
    "convolve",
    "cross_attend",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_fp8",
    "gated_residual_split_norm",
    "gated_residual_split_norm_fp8",
    "gelu_quantize_rows",
    "gelu_tanh",
    "layer_norm",
    "layer_norm_modulate",
    "layer_norm_modulate_fp8",
    "linear_gelu",
    "merge_attention",
    "modulation_table",
    "norm_rope",
    "norm_rows",
    "place_with_bias",
    "qk_norm_rope",
    "quantize_rows",
    "residual_scatter_norm",
    "residual_scatter_norm_fp8",
    "rgb_to_yuv420",
    "rms_norm",
    "rms_norm_silu",
    "scaled_linear",
    "to_uint8",
    "vae_rms_norm",
]
