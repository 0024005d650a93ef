"""The VAE's layers with channels last: the functions of `vae_layers` over the same weights, in fewer passes.

A causal convolution reads a buffer with two spare frames in front, into which the norm before it writes, or windows of
three frames side by side, over which a convolution in two dimensions gives the same; its bias travels with whatever
follows. Every result is channels_last_3d: one conversion would undo the gain.

Shape letters: B clips, C channels, T frames, H x W the grid at hand.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helios_serve.kernels.vae_epilogue import add_bias, convolve, place_with_bias
from helios_serve.kernels.vae_norm_silu import norm_rows, norm_windows
from helios_serve.model_executor.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    MidBlock,
    NormSilu,
    ResidualBlock,
    Slab,
    Upsample,
    as_clip,
    as_frames,
)
from helios_serve.parallel.vae_shards import WHOLE, WidthShard

L = TypeVar("L", bound=nn.Module)

LAYOUT = torch.channels_last_3d
_CONTEXT = 2  # frames that a causal convolution looks back at


def causal_conv(conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
    """The layer with its bias: [B, C, T, H, W] -> [B, C', T, H, W]."""
    return biased(conv, _convolved_copy(conv, x, slab))


def biased(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Adds the bias that a convolution has left out, in place: [B, C', T, H, W]."""
    add_bias(_pixels(x), _bias(conv), None)
    return x


def normed_conv(conv: CausalConv3d, norm: NormSilu, x: Tensor, slab: Slab, bias: Tensor | None = None) -> Tensor:
    """`conv` of the norm of `x + bias`, without its own bias: [B, C, T, H, W] -> [B, C', T, H, W]."""
    return _convolved(conv, _normed(conv, norm, x, slab, bias))


def _normed(conv: CausalConv3d, norm: NormSilu, x: Tensor, slab: Slab, bias: Tensor | None) -> Tensor:
    """What `conv` reads: the norm of `x + bias` behind its context, [B, C, 2 + T, H, W], or as windows of three frames,
    [B, T, H, W, 3, C], if it has a weight for those. Keeps the last two frames for the next slab."""
    if conv.window_weight is not None:
        return _normed_windows(conv, norm, x, slab, bias)
    frames, left = _frames_of(conv, x, slab)
    left_rows = None if left is None else _rows(left)
    norm_rows(_rows(x), norm.gamma.flatten(), bias, left_rows, True, _rows(frames))
    _keep_tail(conv, frames, left, slab)
    return frames


def _normed_windows(conv: CausalConv3d, norm: NormSilu, x: Tensor, slab: Slab, bias: Tensor | None) -> Tensor:
    num_clips, channels, num_frames, height, width = x.shape
    left, num_taps = slab.take(conv), _CONTEXT + 1
    shape = (num_clips, num_frames, height, width, num_taps, channels)
    windows = torch.empty(shape, dtype=x.dtype, device=x.device)
    left_rows = None if left is None else _rows(left)
    seen = windows.view(num_clips, -1, num_taps, channels)
    norm_windows(_rows(x), norm.gamma.flatten(), bias, left_rows, True, height * width, seen)
    slab.columns.fill_windows(windows)
    if not slab.is_last:
        tail = _empty(x, channels, _CONTEXT) if left is None else left
        slab.tails[conv] = tail.copy_(windows[:, -1, :, :, 1:].permute(0, 4, 3, 1, 2))
    return windows


def residual_block(block: ResidualBlock, x: Tensor, slab: Slab) -> Tensor:
    """The layer of that name. What was read is let go before more is made: at full size a tensor takes gigabytes."""
    y = normed_conv(block.conv1, block.norm1, x, slab)
    seen = _normed(block.conv2, block.norm2, y, slab, _bias(block.conv1))
    del y
    y = _convolved(block.conv2, seen)
    del seen
    shortcut = block.conv_shortcut
    beside = pointwise(shortcut, x) if isinstance(shortcut, nn.Conv3d) else x
    add_bias(_pixels(y), _bias(block.conv2), _pixels(beside))
    return y


def attention_block(block: AttentionBlock, x: Tensor) -> Tensor:
    """The layer of that name; its projections are matrix products over pixels."""
    num_clips, channels, num_frames, height, width = x.shape
    pixels = _pixels(x)
    normed = torch.empty_like(pixels)
    norm_rows(pixels[None], block.norm.gamma.flatten(), None, None, False, normed[None])
    by_frame = normed.view(num_clips * num_frames, 1, height * width, channels)
    q, k, v = F.linear(by_frame, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q, k, v).reshape(-1, channels)
    out = F.linear(attended, block.proj.weight.flatten(1))
    add_bias(out, _bias(block.proj), pixels)
    return _kept(_clip(out, x))


def mid_block(block: MidBlock, x: Tensor, slab: Slab) -> Tensor:
    """Residual, attention, residual."""
    first, last = block.resnets
    (attention,) = block.attentions
    x = residual_block(_typed(first, ResidualBlock), x, slab)
    x = slab.columns.by_frame(lambda frames: attention_block(_typed(attention, AttentionBlock), frames), x)
    return residual_block(_typed(last, ResidualBlock), x, slab)


def up_layer(layer: nn.Module, x: Tensor, slab: Slab) -> Tensor:
    """A residual block or an upsampling, of which the decoder's blocks are rows."""
    if isinstance(layer, ResidualBlock):
        return residual_block(layer, x, slab)
    return upsample(_typed(layer, Upsample), x, slab)


def down_layer(layer: nn.Module, x: Tensor, slab: Slab) -> Tensor:
    """A residual block or a downsampling, of which the encoder is a row."""
    if isinstance(layer, ResidualBlock):
        return residual_block(layer, x, slab)
    return downsample(_typed(layer, Downsample), x, slab)


def downsample(layer: Downsample, x: Tensor, slab: Slab) -> Tensor:
    """The layer of that name."""
    pad, conv = layer.resample
    slab.columns.fill(x)
    frames = _typed(pad, nn.ZeroPad2d)(as_frames(x[..., slab.columns.ghosts :]))
    small = F.conv2d(frames, _typed(conv, nn.Conv2d).weight, stride=2)
    x = slab.columns.surround(biased(_typed(conv, nn.Conv2d), _kept(as_clip(small, x.shape[0]))))
    if layer.time_conv is None:
        return x
    return layer.halve_frames(layer.time_conv, x, slab).contiguous(memory_format=LAYOUT)


def upsample(layer: Upsample, x: Tensor, slab: Slab) -> Tensor:
    """The layer of that name."""
    if layer.time_conv is not None:
        x = double_frames(layer.time_conv, x, slab)
    conv = _typed(layer.resample[1], nn.Conv2d)
    slab.columns.fill(x)
    if layer.folded_weight is None:
        large = slab.columns.own(F.interpolate(as_frames(x), scale_factor=2.0, mode="nearest-exact"))
        return biased(conv, _kept(as_clip(convolve(large, conv.weight, (1, 1)), x.shape[0])))
    return folded_upsample(x, layer.folded_weight, _bias(conv), slab.columns)


def double_frames(time_conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
    """1 + n frames -> 1 + 2n in the first slab, where frame 0 never meets `time_conv`; then n -> 2n."""
    num_passed = 1 if slab.is_first else 0
    if x.shape[2] == num_passed:
        return x
    doubled = _convolved_copy(time_conv, x[:, :, num_passed:], slab)
    out = _empty(x, x.shape[1], num_passed + 2 * doubled.shape[2])
    out[:, :, :num_passed].copy_(x[:, :, :num_passed])
    parts = zip(doubled.chunk(2, dim=1), _bias(time_conv).chunk(2), strict=True)
    for parity, (part, bias) in enumerate(parts):
        for clip, placed in zip(part, out[:, :, num_passed + parity :: 2], strict=True):
            place_with_bias(clip.permute(1, 2, 3, 0), bias, placed.permute(1, 2, 3, 0))
    return _kept(out)


def folded_upsample(x: Tensor, folded_weight: Tensor, bias: Tensor, columns: WidthShard = WHOLE) -> Tensor:
    """Nearest upsampling and a 3x3 convolution: x [B, C, T, H, W], weight of `fold_upsample` -> [B, C', T, 2H, 2W].

    One convolution computes all four phases on the small grid and one line and column more: the window of a phase
    begins above and left of its pixel, or at it. Of the columns that ghosts become, the outer ones are left out.
    """
    num_clips, _, num_frames, height, width = x.shape
    phases = convolve(as_frames(x), folded_weight, (1, 1)).permute(0, 2, 3, 1)  # (B*T, H + 1, W + 1, 4C')
    ghosts, num_placed = columns.ghosts, width - columns.ghosts  # of each parity
    shape = (num_clips * num_frames, 2 * height, 2 * num_placed, len(bias))
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    for index, part in enumerate(phases.chunk(4, dim=3)):
        lower, right = divmod(index, 2)
        first = max(right, ghosts)
        seen = part[:, lower : lower + height, first : first + num_placed]
        place_with_bias(seen, bias, out[:, lower::2, right ^ ghosts :: 2])
    return _kept(as_clip(out.permute(0, 3, 1, 2), num_clips))


def widen(module: nn.Module, channels: Container[int], dtype: torch.dtype) -> None:
    """Gives 3x3x3 convolutions of so many input channels their weights over windows: [C', 3C, 3, 3], the oldest frame's
    channels first."""
    for layer in module.modules():
        if isinstance(layer, CausalConv3d) and layer.in_channels in channels and layer.kernel_size == (3, 3, 3):
            wide = layer.weight.transpose(1, 2).flatten(1, 2)
            layer.window_weight = wide.to(dtype).contiguous(memory_format=torch.channels_last)


def fold(layer: Upsample, dtype: torch.dtype) -> None:
    """Gives a layer its folded weight, from weights in the precision of their checkpoint."""
    folded = fold_upsample(_typed(layer.resample[1], nn.Conv2d).weight)
    layer.folded_weight = folded.to(dtype).contiguous(memory_format=torch.channels_last)


def fold_upsample(weight: Tensor) -> Tensor:
    """The taps of a 3x3 convolution after nearest upsampling, as they meet the small grid.

    Even lines see the line above once and their own twice, odd ones their own twice and the next once; columns
    likewise. Sums are float32 (float64 for float64 weights).

    Args:
        weight: [C', C, 3, 3].

    Returns: [4C', C, 2, 2], phases in the order (even, even), (even, odd), (odd, even), (odd, odd) of (line, column).
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    lines = _folded_taps(wide, 2)
    return torch.cat([taps for line in lines for taps in _folded_taps(line, 3)])


def _folded_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    first, middle, last = weight.split(1, dim)
    return torch.cat((first, middle + last), dim), torch.cat((first + middle, last), dim)


def pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1x1 convolution as a matrix product over pixels: [B, C, T, H, W] -> [B, C', T, H, W]."""
    return _kept(_clip(F.linear(_pixels(x), conv.weight.flatten(1), conv.bias), x))


def lay_out(module: nn.Module, dtype: torch.dtype) -> None:
    """Brings the weights of convolutions to channels last, and all parameters to `dtype`."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layout = LAYOUT if isinstance(layer, nn.Conv3d) else torch.channels_last
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)


def _convolved_copy(conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
    """`conv` without its bias, of an `x` that no norm writes."""
    frames, left = _frames_of(conv, x, slab)
    spare = frames[:, :, :_CONTEXT]
    if left is None:
        spare.zero_()
    else:
        spare.copy_(left)
    frames[:, :, _CONTEXT:].copy_(x)
    _keep_tail(conv, frames, left, slab)
    return _convolved(conv, frames)


def _frames_of(conv: CausalConv3d, x: Tensor, slab: Slab) -> tuple[Tensor, Tensor | None]:
    """Room for the context and for x [B, C, T, H, W], and the context, which is None at the start of a clip."""
    return _empty(x, x.shape[1], _CONTEXT + x.shape[2]), slab.take(conv)


def _keep_tail(conv: CausalConv3d, frames: Tensor, left: Tensor | None, slab: Slab) -> None:
    """Gives frames [B, C, 2 + T, H, W] their ghosts, and keeps the last two in the memory of `left`."""
    if conv.kernel_size[2] > 1:
        slab.columns.fill(frames[:, :, _CONTEXT:])
    if not slab.is_last:
        tail = _empty(frames, frames.shape[1], _CONTEXT) if left is None else left
        slab.tails[conv] = tail.copy_(frames[:, :, -_CONTEXT:])


def _convolved(conv: CausalConv3d, seen: Tensor) -> Tensor:
    """`conv` without its bias over frames [B, C, 2 + T, H, W] or windows [B, T, H, W, 3, C]: [B, C', T, H, W]."""
    if seen.dim() == 5:
        return _kept(convolve(seen, conv.weight, (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)))
    assert conv.window_weight is not None
    num_clips, num_frames, height, width = seen.shape[:4]
    pictures = seen.view(num_clips * num_frames, height, width, -1).permute(0, 3, 1, 2)
    return _kept(as_clip(convolve(pictures, conv.window_weight, (1, 1)), num_clips))


def _empty(like: Tensor, channels: int, num_frames: int) -> Tensor:
    shape = (like.shape[0], channels, num_frames, *like.shape[3:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAYOUT)


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, T*H*W, C], a view."""
    return x.permute(0, 2, 3, 4, 1).view(x.shape[0], -1, x.shape[1])


def _pixels(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T*H*W, C], a view."""
    return x.permute(0, 2, 3, 4, 1).view(-1, x.shape[1])


def _clip(pixels: Tensor, like: Tensor) -> Tensor:
    """[B*T*H*W, C'] -> [B, C', T, H, W], a view; the grid is that of `like`."""
    num_clips, _, *grid = like.shape
    return pixels.view(num_clips, *grid, -1).permute(0, 4, 1, 2, 3)


def _kept(x: Tensor) -> Tensor:
    assert x.is_contiguous(memory_format=LAYOUT), f"strides {x.stride()} of {tuple(x.shape)}: channels must be last"
    return x


def _bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _typed(layer: nn.Module, kind: type[L]) -> L:
    assert isinstance(layer, kind)
    return layer
