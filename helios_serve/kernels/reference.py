"""Every kernel in plain PyTorch: the definition that fused kernels are compared with, and the path on any device.

Knows tensors only: no nouns of the engine, no configuration, no ranks. Statistics and modulation are computed in
float32 (float64 for float64 inputs) and rounded once to the input's dtype, at the places where the reference rounds.
Shape letters: N tokens, D width, H heads, Dh head size, R modulation rows, L text tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from helios_serve.kernels.fp8 import quantize_rows as quantize_rows
from helios_serve.kernels.reference_vae import add_bias as add_bias
from helios_serve.kernels.reference_vae import conv3d as conv3d
from helios_serve.kernels.reference_vae import convolve as convolve
from helios_serve.kernels.reference_vae import norm_rows as norm_rows
from helios_serve.kernels.reference_vae import place_with_bias as place_with_bias
from helios_serve.kernels.reference_vae import rgb_to_yuv420 as rgb_to_yuv420
from helios_serve.kernels.reference_vae import rms_norm_silu as rms_norm_silu
from helios_serve.kernels.reference_vae import to_uint8 as to_uint8
from helios_serve.kernels.reference_vae import vae_rms_norm as vae_rms_norm


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then `* (1 + scale) + shift` with the modulation row of each token.

    Args:
        x: [N, D], any float dtype.
        shift, scale: [R, D] float32.
        row: [N] integer, which of the R rows a token uses.

    Returns: [N, D] in the dtype of `x`.
    """
    wide = _accumulator(x)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(wide)[row]) + shift.to(wide)[row]).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with affine [D], float32 inside: [N, D] -> [N, D]."""
    wide = _accumulator(x)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, row: Tensor) -> Tensor:
    """`x + y * gate[row]`, one rounding: x, y [N, D]; gate [R, D] float32; row [N] -> [N, D]."""
    wide = _accumulator(x)
    return (x.to(wide) + y.to(wide) * gate.to(wide)[row]).to(x.dtype)


def modulation_table(tables: Tensor, modulation: Tensor) -> Tensor:
    """How every layer modulates every row: tables [L, 6, D] float32, modulation [R, 6, D] -> [L, R, 6, D] float32."""
    return tables[:, None] + modulation


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, row: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """`gated_residual` into `x` [N, D] itself, then `layer_norm_modulate` of the rounded sum -> [N, D]."""
    x.copy_(gated_residual(x, y, gate, row))
    return layer_norm_modulate(x, shift, scale, row, eps)


def gated_residual_split_norm(
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
    current: Tensor,
) -> None:
    """`gated_residual` into `x` [N, D] itself, then the norms of the rounded sum.

    History rows, whose `current_place` [N] int32 is negative, go through `layer_norm_modulate` to their place in
    `normed` [N, D], the others through `layer_norm` to row `current_place` of `current` [M, D]. What remains of
    `normed` is left as it is.
    """
    x.copy_(gated_residual(x, y, gate, row))
    is_history = current_place < 0
    normed[is_history] = layer_norm_modulate(x[is_history], shift, scale, row[is_history], eps)
    current[current_place[~is_history].long()] = layer_norm(x[~is_history], weight, bias, eps)


def residual_scatter_norm(
    x: Tensor, y: Tensor, index: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float, normed: Tensor
) -> None:
    """Adds y [M, D] to the rows `index` [M] of `x` [N, D], rounded once, and writes `layer_norm_modulate` of them to
    the same rows of `normed` [N, D]. `row` [N] belongs to the rows of `x`."""
    wide = _accumulator(x)
    added = (x[index].to(wide) + y.to(wide)).to(x.dtype)
    x[index] = added
    normed[index] = layer_norm_modulate(added, shift, scale, row[index], eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x [N, D], weight [D] -> [N, D]."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs: x [N, H, Dh], rotary [N, 2, Dh/2] float32 (cos, sin) -> [N, H, Dh].

    Averaged rows (of the pooled history) are not unit vectors, so cos and sin are used as they are.
    """
    cos, sin = rotary[:, None].to(_accumulator(x)).unbind(2)  # (N, 1, Dh/2) each
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def norm_rope(
    x: Tensor,
    weight: Tensor,
    rotary: Tensor,
    eps: float,
    history_scale: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """One of the two tensors of `qk_norm_rope` alone: x [N, H, Dh], others as there -> [N, H, Dh]."""
    x = rotate(rms_norm(x.flatten(1), weight, eps).view_as(x), rotary)
    if history_scale is None:
        return x
    assert row is not None
    scale = torch.where((row == 0)[:, None, None], history_scale.view(1, -1, 1), 1.0)  # (N, H | 1, 1)
    return (x * scale).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: Tensor,
    eps: float,
    history_scale: Tensor | None = None,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of q and k over all heads, rotation, and the amplified history's key scale.

    Args:
        qkv: [N, 3, H, Dh], the output of the fused projection.
        q_weight, k_weight: [H * Dh].
        rotary: [N, 2, Dh/2] float32.
        history_scale: [H] or [1] float32, multiplied into the keys of tokens whose `row` is 0; None when the
            checkpoint does not amplify its history.
        row: [N] integer modulation rows; row 0 is the history's. Needed with `history_scale`.

    Returns: q, k, v, each [N, H, Dh].
    """
    q, k, v = qkv.unbind(1)
    q = norm_rope(q, q_weight, rotary, eps)
    return q, norm_rope(k, k_weight, rotary, eps, history_scale, row), v


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, elementwise."""
    return F.gelu(x, approximate="tanh")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh(x @ weight.T + bias)`: x [N, K], weight [M, K], bias [M] -> [N, M]."""
    return gelu_tanh(F.linear(x, weight, bias))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of one segment, written out.

    Args:
        q: [Nq, H, Dh]; k, v: [Nk, H, Dh].
        scale: factor of the logits.
        key_bias: [Nk], added to the scaled logits.

    Returns: out [Nq, H, Dh] in the dtype of `q`; lse [H, Nq] natural-log, float32 (float64 for float64 inputs).
    """
    wide = _accumulator(q)
    logits = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    if key_bias is not None:
        logits = logits + key_bias.to(wide)
    lse = logits.logsumexp(-1)
    out = torch.einsum("hqk,khd->qhd", (logits - lse[..., None]).exp(), v.to(wide))
    return out.to(q.dtype), lse


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
