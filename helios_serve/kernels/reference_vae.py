"""The VAE's kernels in plain PyTorch: the definitions that fused kernels are compared with, and the path on any device.

Knows tensors only. Norms are computed in float32 (float64 for float64 inputs); every function rounds to the dtype of
its tensors where its text says so. Rows are pixels: a clip [B, C, T, H, W] in channels_last_3d is B*T*H*W rows of C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def vae_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the channels, `x / max(|x|, 1e-12) * sqrt(C) * gamma`, rounded once.

    Args:
        x: [B, C, ...], any float dtype.
        gamma: C values, [C, 1, ...] with the number of trailing dimensions of `x`.

    Returns: the shape and dtype of `x`.
    """
    return _vae_normed(x, gamma).to(x.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`silu(vae_rms_norm(x, gamma))` with one rounding instead of two; shapes as there."""
    return F.silu(_vae_normed(x, gamma)).to(x.dtype)


def _vae_normed(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x.to(_accumulator(x))
    length = wide.square().sum(dim=1, keepdim=True).sqrt_().clamp_(min=1e-12)
    return wide / length * (x.shape[1] ** 0.5 * gamma.to(wide.dtype))


def norm_rows(x: Tensor, gamma: Tensor, bias: Tensor | None, left: Tensor | None, has_silu: bool, out: Tensor) -> None:
    """The norm of every row behind the context of a causal convolution, which `out` then is the input of.

    Args:
        x: [B, N, C], contiguous.
        gamma: [C].
        bias: [C], added to `x` before the norm and rounded to its dtype: of the convolution that made `x`.
        left: [B, L, C] contiguous, the rows that come first; None for zeros.
        has_silu: `rms_norm_silu`, else `vae_rms_norm`.
        out: [B, L + N, C] contiguous, is overwritten.
    """
    num_left = out.shape[1] - x.shape[1]
    if left is None:
        out[:, :num_left] = 0
    else:
        out[:, :num_left] = left
    rows = (x if bias is None else x + bias).transpose(1, 2)
    apply = rms_norm_silu if has_silu else vae_rms_norm
    out[:, num_left:] = apply(rows, gamma[:, None]).transpose(1, 2)


def norm_windows(
    x: Tensor, gamma: Tensor, bias: Tensor | None, left: Tensor | None, has_silu: bool, frame_rows: int, out: Tensor
) -> None:
    """What `norm_rows` computes, in the windows of frames that a causal convolution sees side by side.

    Args:
        x, gamma, bias, left, has_silu: as there; `left` and zeros are K - 1 frames of `frame_rows` rows each.
        out: [B, N, K, C] contiguous, is overwritten: row n and those of the K - 1 frames before it, oldest first.
    """
    num_clips, num_rows, num_taps, channels = out.shape
    frames = x.new_empty((num_clips, (num_taps - 1) * frame_rows + num_rows, channels))
    norm_rows(x, gamma, bias, left, has_silu, frames)
    for tap in range(num_taps):
        out[:, :, tap] = frames[:, tap * frame_rows : tap * frame_rows + num_rows]


def add_bias(x: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """`x + bias`, then `+ residual`, into `x` itself, each sum rounded: x, residual [N, C] contiguous; bias [C]."""
    x.add_(bias)
    if residual is not None:
        x.add_(residual)


def place_with_bias(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """`out = x + bias`: x, out [F, H, W, C], strided but for their last dimension; bias [C]."""
    out.copy_(x + bias)


def convolve(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """Convolution of stride 1 without bias, channels last in and out.

    Args:
        x: [B, C, H, W] channels_last or [B, C, T, H, W] channels_last_3d.
        weight: [C', C, kh, kw] or [C', C, kt, kh, kw], in the same layout.
        padding: zeros on both sides of each dimension of the grid.

    Returns: [B, C', ...] in the layout of `x`.
    """
    if x.dim() == 4:
        return F.conv2d(x, weight, None, 1, tuple(padding)).contiguous(memory_format=torch.channels_last)
    return F.conv3d(x, weight, None, 1, tuple(padding)).contiguous(memory_format=torch.channels_last_3d)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int]) -> Tensor:
    """3-D convolution of stride 1: x [B, C, T, H, W], weight [C', C, kt, kh, kw] -> [B, C', T', H', W'].

    On a CPU oneDNN is asked for by name: for few channels PyTorch's own choice is ten times slower.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, padding=padding)


def to_uint8(frames: Tensor) -> Tensor:
    """Decoded frames as bytes, rounded half to even: [F, 3, H, W] in [-1, 1] -> [F, H, W, 3] uint8.

    Values outside the range are clamped; the arithmetic is float32.
    """
    scaled = (frames.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def rgb_to_yuv420(frames: Tensor) -> Tensor:
    """Decoded frames as planar I420 in BT.709 limited range: [F, 3, H, W] in [-1, 1] -> [F, H*3/2, W] uint8.

    H and W are even. Values outside the range are clamped. Chroma is the mean of each 2x2 block (centre siting); the
    arithmetic is float32, rounded to nearest. Source: ITU-R BT.709-6, items 3.2 to 3.5.
    """
    num_frames, _, height, width = frames.shape
    red, green, blue = (frames.float() * 0.5 + 0.5).clamp(0, 1).unbind(1)  # (F, H, W) each
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    spans = (luma.new_full((), span) for span in (1.8556, 1.5748))  # by a number, CUDA multiplies with its inverse
    blueness, redness = ((colour - luma) / span for colour, span in zip((blue, red), spans, strict=True))
    chroma = torch.stack((blueness, redness), dim=1)  # (F, 2, H, W) in [-0.5, 0.5]
    y = (16 + 219 * luma).round()
    uv = (128 + 224 * F.avg_pool2d(chroma, 2)).round()
    flat = torch.cat((y.flatten(1), uv.flatten(1)), dim=1).to(torch.uint8)  # Y, then U, then V plane
    return flat.view(num_frames, height * 3 // 2, width)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
