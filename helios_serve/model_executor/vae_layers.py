"""The layers of the Wan VAE, causal in time: a clip may pass through them whole or slab by slab.

Knows what each layer keeps for the next slab of a clip. Knows no configuration and no order of layers; nothing about a
clip is kept in a module.

Shape letters: B clips, C channels, T frames, H x W the grid at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helios_serve.kernels import conv3d, rms_norm_silu, vae_rms_norm
from helios_serve.parallel.vae_shards import WHOLE, WidthShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Consecutive frames of one clip on their way through the network, and what they take over from earlier slabs.

    `tails` belongs to the clip: the last input frames of each temporal convolution, copied so that they do not keep
    the slab's activations alive. It is empty before the first slab and after the last one. With `keeps_sum_order`
    norms and convolutions add up in the order of the reference, equal to the last bit and slower. `columns`: those of
    the picture that are at hand, with their ghosts, which a layer may overwrite in its input.
    """

    is_first: bool
    is_last: bool
    keeps_sum_order: bool
    tails: dict[nn.Module, Tensor]
    columns: WidthShard = WHOLE

    def take(self, conv: nn.Module) -> Tensor | None:
        """The frames that `conv` left behind, None when it has not run in this clip."""
        return self.tails.pop(conv, None)

    def leave(self, conv: nn.Module, x: Tensor, num_frames: int) -> None:
        """Keeps the last frames of x [B, C, T, H, W] for the next slab, if there is one."""
        if not self.is_last:
            self.tails[conv] = x[:, :, -num_frames:].clone()


class CausalConv3d(nn.Conv3d):
    """Convolution over the present and the two previous frames, which are zero at the start of a clip; keeps H x W.

    `window_weight` is made from the weight when the fused decoder lays the three frames side by side.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(in_dim, out_dim, kernel)
        self.window_weight: Tensor | None = None

    def forward(self, x: Tensor, slab: Slab) -> Tensor:  # type: ignore[override]
        """[B, C, T, H, W] -> [B, out_dim, T, H, W]."""
        left = slab.take(self)
        if left is None:
            left = x.new_zeros(()).expand(x.shape[0], x.shape[1], 2, *x.shape[3:])
        x = torch.cat((left, x), dim=2)
        if self.kernel_size[2] > 1:
            slab.columns.fill(x[:, :, 2:])
        slab.leave(self, x, 2)
        padding = (0, self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        if slab.keeps_sum_order:
            return F.conv3d(x, self.weight, self.bias, padding=padding)
        return conv3d(x, self.weight, self.bias, padding)


class Norm(nn.Module):
    """RMS norm over the channels of single frames [B*T, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        return _normed(x, self.gamma) if slab.keeps_sum_order else vae_rms_norm(x, self.gamma)


class NormSilu(nn.Module):
    """RMS norm over the channels of a clip [B, C, T, H, W], then SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        return F.silu(_normed(x, self.gamma)) if slab.keeps_sum_order else rms_norm_silu(x, self.gamma)


class ResidualBlock(nn.Module):
    """Two normed 3x3x3 causal convolutions beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = NormSilu(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim)
        self.norm2 = NormSilu(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim)
        self.conv_shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        y = self.conv1(self.norm1(x, slab), slab)
        y = self.conv2(self.norm2(y, slab), slab)
        out: Tensor = y + self.conv_shortcut(x)
        return out


class AttentionBlock(nn.Module):
    """Single-head attention among the positions of each frame, added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = Norm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        frames = as_frames(x)
        # contiguous: fused attention wants the channels of a position side by side
        qkv = self.to_qkv(self.norm(frames, slab)).flatten(2).transpose(1, 2).contiguous()  # (B*T, H*W, 3C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + as_clip(self.proj(attended.transpose(1, 2).reshape(frames.shape)), x.shape[0])


class MidBlock(nn.Module):
    """Residual, attention, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        x = self.resnets[0](x, slab)
        x = slab.columns.by_frame(lambda frames: self.attentions[0](frames, slab), x)
        out: Tensor = self.resnets[1](x, slab)
        return out


class Downsample(nn.Module):
    """Halves H and W, and optionally the frames after the clip's first one."""

    def __init__(self, dim: int, halves_frames: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if halves_frames else None

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        slab.columns.fill(x)
        small = self.resample(as_frames(x[..., slab.columns.ghosts :]))
        x = slab.columns.surround(as_clip(small, x.shape[0]))
        return x if self.time_conv is None else self.halve_frames(self.time_conv, x, slab)

    @staticmethod
    def halve_frames(time_conv: nn.Conv3d, x: Tensor, slab: Slab) -> Tensor:
        """1 + 2n frames -> 1 + n in the first slab, where frame 0 is passed on as it is; then 2n -> n."""
        last = slab.take(time_conv)
        if last is not None:
            x = torch.cat((last, x), dim=2)
        slab.leave(time_conv, x, 1)
        if not slab.is_first:
            return time_conv(x)
        return x if x.shape[2] == 1 else torch.cat((x[:, :, :1], time_conv(x)), dim=2)


class Upsample(nn.Module):
    """Doubles H and W and halves the channels; optionally doubles the frames after the clip's first one.

    `folded_weight` is made from the weights when the fused decoder folds the upsampling into its convolution.
    """

    def __init__(self, dim: int, doubles_frames: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if doubles_frames else None
        self.folded_weight: Tensor | None = None

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, slab)
        slab.columns.fill(x)
        enlarge, conv = self.resample
        return as_clip(conv(slab.columns.own(enlarge(as_frames(x)))), x.shape[0])

    @staticmethod
    def _double_frames(time_conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
        """1 + n frames -> 1 + 2n in the first slab, where frame 0 never meets `time_conv`; then n -> 2n."""
        num_passed = 1 if slab.is_first else 0
        if x.shape[2] == num_passed:
            return x
        even, odd = time_conv(x[:, :, num_passed:], slab).chunk(2, dim=1)
        out = x.new_empty(*x.shape[:2], num_passed + 2 * even.shape[2], *x.shape[3:])
        out[:, :, :num_passed] = x[:, :, :num_passed]
        out[:, :, num_passed::2] = even
        out[:, :, num_passed + 1 :: 2] = odd
        return out


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks, then an upsampling except at full size."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: Upsample | None) -> None:
        super().__init__()
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList([ResidualBlock(*pair) for pair in pairwise(dims)])
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, slab)
        return x


def _normed(x: Tensor, gamma: Tensor) -> Tensor:
    """`vae_rms_norm` by the reference's operations, one by one."""
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma


def as_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]; a view in channels_last_3d."""
    return x.transpose(1, 2).flatten(0, 1)


def as_clip(frames: Tensor, num_clips: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W], a view."""
    return frames.unflatten(0, (num_clips, -1)).transpose(1, 2)
