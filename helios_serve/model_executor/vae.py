"""The Wan 2.1 VAE: pixel frames to latents and back, a whole clip at once or in slabs with the same result.

Knows its architecture and the latents' normalisation. Knows nothing of chunks of a request, files, devices or random
generators: noise for the posterior comes in as a tensor, weights are loaded by name from outside.

Shape letters: B clips, C channels, Z latent channels, T frames, H x W the grid at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from helios_serve.errors import CheckpointError
from helios_serve.model_executor import vae_fused
from helios_serve.model_executor.json_keys import JsonKeys, require
from helios_serve.model_executor.vae_layers import (
    CausalConv3d,
    Downsample,
    MidBlock,
    NormSilu,
    ResidualBlock,
    Slab,
    UpBlock,
    Upsample,
)
from helios_serve.parallel.vae_shards import WHOLE, WidthShard

_FILE = "vae/config.json"
_RGB = 3  # channels of a pixel
_SERVED: dict[str, object] = {
    "is_residual": False,
    "patch_size": None,
    "attn_scales": [],
    "in_channels": _RGB,
    "out_channels": _RGB,
}
_T = TypeVar("_T")

_WINDOWED_BF16, _WINDOWED_FP32 = (96, 384), (96, 192, 384)
"""With cuDNN 9.19 on an H100, 33 frames of 96 channels at 384x640 take 7.3 instead of 16.6 ms in bfloat16, and 17
frames 8.3 instead of 19.1 ms in float32 (TF32 products, as PyTorch's default has them).
Source: benchmarks/results/2026-11-27_trials_h100.log."""
VaePrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """What varies in `vae/config.json` among Wan 2.1 VAEs; the defaults are those of the reference's class.

    Raises: CheckpointError, with the key as `param`, for values that contradict each other.
    """

    CLASS_NAME: ClassVar[str] = "AutoencoderKLWan"

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> VaeConfig:
        """Reads a parsed config.json; absent keys take the defaults, keys that begin with "_" are bookkeeping.

        Raises: CheckpointError naming the key that is of the wrong type, inconsistent or set to what is not served.
        """
        keys, default = JsonKeys(_FILE, config), cls()
        if "_class_name" in config:
            keys.require_class(cls.CLASS_NAME)
        base_dim = keys.positive("base_dim", default.base_dim)
        if not keys.is_null("decoder_base_dim"):
            keys.require_only("decoder_base_dim", base_dim)
        for key, served in _SERVED.items():
            keys.require_only(key, served)
        parsed = cls(
            base_dim=base_dim,
            z_dim=keys.positive("z_dim", default.z_dim),
            dim_mult=_list(config, "dim_mult", default.dim_mult, int),
            num_res_blocks=keys.positive("num_res_blocks", default.num_res_blocks),
            temperal_downsample=_list(config, "temperal_downsample", default.temperal_downsample, bool),
            latents_mean=keys.numbers("latents_mean", default.latents_mean),
            latents_std=keys.numbers("latents_std", default.latents_std),
            scale_factor_temporal=keys.positive("scale_factor_temporal", default.scale_factor_temporal),
            scale_factor_spatial=keys.positive("scale_factor_spatial", default.scale_factor_spatial),
        )
        keys.warn_of_unread(ignored=("dim_mult", "temperal_downsample", "dropout"))  # dropout is for training
        return parsed

    def __post_init__(self) -> None:
        num_scales = len(self.dim_mult) - 1
        spatial, temporal = 2**num_scales, 2 ** sum(self.temperal_downsample)
        mean, std = self.latents_mean, self.latents_std
        rules = (
            ("dim_mult", num_scales >= 0 and all(mult > 0 for mult in self.dim_mult), "a list of positive integers"),
            ("temperal_downsample", len(self.temperal_downsample) == num_scales, f"{num_scales} entries, by dim_mult"),
            ("latents_mean", len(mean) == self.z_dim, f"z_dim = {self.z_dim} entries"),
            ("latents_std", len(std) == self.z_dim and all(s > 0 for s in std), f"{self.z_dim} positive numbers"),
            ("scale_factor_spatial", self.scale_factor_spatial == spatial, f"{spatial}, by dim_mult"),
            ("scale_factor_temporal", self.scale_factor_temporal == temporal, f"{temporal}, by temperal_downsample"),
        )
        for key, holds, right in rules:
            if not holds:
                raise CheckpointError(f"{_FILE}: {key} must be {right}", param=key)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeOptions:
    """How a VAE computes.

    precision: of the decoder; fp32 leaves the weights as they were loaded, as the encoder's always are. layout:
    contiguous takes the reference's operations one by one, channels_last the fused ones. slab_frames: latent frames at
    a time after the first; None: the whole clip. is_upsample_folded: computes upsamplings on the small grid, with sums
    of weights; for channels_last only. windowed_channels: numbers of input channels for which a causal convolution of
    the decoder is one in two dimensions over windows of three frames, before which three times as much is written, and
    windowed_encoder_channels those of the encoder; for channels_last only.
    """

    precision: VaePrecision = "fp32"
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    slab_frames: int | None = None
    is_upsample_folded: bool = False
    windowed_channels: tuple[int, ...] = ()
    windowed_encoder_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        is_plain = self.layout == "contiguous"
        assert self.precision == "fp32" or not is_plain, "bf16 is computed with channels last"
        assert not (self.is_upsample_folded and is_plain), "upsamplings are folded with channels last"
        is_windowed = bool(self.windowed_channels or self.windowed_encoder_channels)
        assert not (is_windowed and is_plain), "windows are made with channels last"

    @classmethod
    def on(cls, device: torch.device, precision: VaePrecision | None = None) -> VaeOptions:
        """The reference's operations for fp32 on a CPU, else the fused ones; unless asked for, CUDA devices decode in
        bf16. Weights are summed for the fold in bf16 alone."""
        chosen = precision or ("bf16" if device.type == "cuda" else "fp32")
        if chosen == "fp32" and device.type == "cpu":
            return cls()
        is_bf16 = chosen == "bf16"
        return cls(
            precision=chosen,
            layout="channels_last",
            is_upsample_folded=is_bf16,
            windowed_channels=_WINDOWED_BF16 if is_bf16 else _WINDOWED_FP32,
            windowed_encoder_channels=_WINDOWED_FP32,
        )


PARITY = VaeOptions()
"""The reference's operations in float32."""


class WanVAE(nn.Module):
    """Encoder and decoder; parameter names and shapes are those of the checkpoint.

    The first pixel frame is one latent frame; each later latent frame is `scale_factor_temporal` pixel frames. Frames
    depend on earlier frames only, and nothing is kept between calls. `slab_frames` bounds memory: frame 0 goes through
    alone, then that many latent frames at a time; None takes the whole clip at once. The result is the same.

    Works in the dtype of the weights, float32 or bfloat16, which the inputs must have; but options with channels last
    bring latents to the decoder's own. They take effect with `prepare`.
    """

    def __init__(self, config: VaeConfig, options: VaeOptions = PARITY) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def prepare(self) -> None:
        """Brings the weights to the precision and layout of the options, once, after they were loaded."""
        if self.options.layout == "contiguous":
            return
        loaded = self.post_quant_conv.weight.dtype
        dtype = torch.bfloat16 if self.options.precision == "bf16" else loaded
        for layer in self.decoder.modules():
            if isinstance(layer, Upsample) and self.options.is_upsample_folded:
                vae_fused.fold(layer, dtype)
        vae_fused.widen(self.decoder, self.options.windowed_channels, dtype)
        for part in (self.decoder, self.post_quant_conv):
            vae_fused.lay_out(part, dtype)
        if self._encodes_fused:
            vae_fused.widen(self.encoder, self.options.windowed_encoder_channels, loaded)
            vae_fused.lay_out(self.encoder, loaded)

    @property
    def _encodes_fused(self) -> bool:
        """Not on a CPU in float32, where the encoder sums in the reference's order."""
        return self.options.layout == "channels_last" and not _is_exact(self.quant_conv.weight)

    def encode(
        self, frames: Tensor, slab_frames: int | None = None, columns: WidthShard = WHOLE
    ) -> tuple[Tensor, Tensor]:
        """Parameters of the posterior, not normalised.

        Args:
            frames: [B, 3, 1 + 4k, H, W] in [-1, 1], H and W multiples of 8 (4 and 8: the config's scale factors).
            slab_frames: latent frames at a time, see the class.
            columns: those that this rank computes, while the others of its axis call with the same frames.

        Returns: mean and logvar, each [B, Z, 1 + k, H/8, W/8]; of W/8 columns, this rank's.
        """
        ratio, cell = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        num_frames, height, width = frames.shape[2:]
        assert num_frames % ratio == 1 % ratio, f"{num_frames} frames: must be 1 + {ratio}k"
        assert height % cell == width % cell == 0, f"{width}x{height}: sides must be multiples of {cell}"
        encoder = self.encoder.fused if self._encodes_fused else self.encoder
        # A rounding here goes through all chunks of a video, and guidance multiplies it each time.
        exact = _is_exact(frames)
        frames = columns.take(frames, cell)
        encoded = [
            encoder(frames[:, :, max(0, 1 + ratio * (start - 1)) : 1 + ratio * (end - 1)], slab)
            for start, end, slab in _slabs(1 + (num_frames - 1) // ratio, slab_frames, columns, keeps_sum_order=exact)
        ]
        mean, logvar = self.quant_conv(columns.own(torch.cat(encoded, dim=2))).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor, slab_frames: int | None = None, columns: WidthShard = WHOLE) -> Tensor:
        """Pixels of denormalised latents.

        Args:
            latents: [B, Z, T, H, W], see `denormalize`.
            slab_frames: latent frames at a time, see the class; None takes those of the options.
            columns: those that this rank computes, while the others of its axis call with the same latents.

        Returns: [B, 3, 1 + 4(T - 1), 8H, 8W], clamped to [-1, 1] (4 and 8: the config's scale factors); of 8W columns,
            this rank's.
        """
        length = self.options.slab_frames if slab_frames is None else slab_frames
        slabs = _slabs(latents.shape[2], length, columns, keeps_sum_order=False)
        latents = columns.take(latents)
        if self.options.layout == "channels_last":
            return self._decode_fused(latents, slabs, columns)
        x = self.post_quant_conv(latents)
        decoded = [columns.own(self.decoder(x[:, :, start:end], slab)).clamp(-1, 1) for start, end, slab in slabs]
        return torch.cat(decoded, dim=2)

    def _decode_fused(self, latents: Tensor, slabs: Iterator[tuple[int, int, Slab]], columns: WidthShard) -> Tensor:
        """The result is in channels_last_3d: the frames' pixels lie back to back."""
        ratio, cell = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        weight = self.post_quant_conv.weight
        x = vae_fused.pointwise(self.post_quant_conv, latents.to(weight.dtype, memory_format=vae_fused.LAYOUT))
        num_clips, _, num_frames, height, width = columns.own(x).shape
        shape = (num_clips, _RGB, 1 + ratio * (num_frames - 1), cell * height, cell * width)
        pixels = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=vae_fused.LAYOUT)
        for start, end, slab in slabs:
            first, last = max(0, 1 + ratio * (start - 1)), 1 + ratio * (end - 1)
            decoded = columns.own(self.decoder.fused(x[:, :, start:end], slab))
            torch.clamp(decoded, -1, 1, out=pixels[:, :, first:last])
        return pixels

    def normalize(self, latents: Tensor) -> Tensor:
        """`(z - mean) * (1 / std)` per channel in the dtype of `latents` [B, Z, T, H, W]: what the transformer sees."""
        mean, scale = self._statistics(latents)
        return (latents - mean) * scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """`z / (1 / std) + mean`, the inverse of `normalize`; the reference divides by the rounded reciprocal."""
        mean, scale = self._statistics(latents)
        return latents / scale + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tensor((self.config.latents_mean, self.config.latents_std), dtype=torch.float32, device="cpu")
        mean, std = both.to(like.device, like.dtype, non_blocking=True).view(2, 1, -1, 1, 1, 1)
        return mean, 1.0 / std


def _is_exact(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """`mean + exp(logvar / 2) * noise` with logvar clamped to [-30, 20]; all of one shape."""
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise


class Encoder(nn.Module):
    """Frames [B, 3, T, H, W] -> [B, 2Z, T', H/8, W/8], before `quant_conv`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(_RGB, dims[0])
        self.down_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            level_dims = [in_dim] + [out_dim] * config.num_res_blocks
            self.down_blocks.extend(ResidualBlock(*pair) for pair in pairwise(level_dims))
            if level < len(config.temperal_downsample):
                self.down_blocks.append(Downsample(out_dim, config.temperal_downsample[level]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = NormSilu(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        x = self.conv_in(x, slab)
        for block in self.down_blocks:
            x = block(x, slab)
        x = self.mid_block(x, slab)
        out: Tensor = self.conv_out(self.norm_out(x, slab), slab)
        return out

    def fused(self, x: Tensor, slab: Slab) -> Tensor:
        """The same with channels last; needs weights in that layout."""
        x = vae_fused.causal_conv(self.conv_in, x.contiguous(memory_format=vae_fused.LAYOUT), slab)
        for block in self.down_blocks:
            x = vae_fused.down_layer(block, x, slab)
        x = vae_fused.mid_block(self.mid_block, x, slab)
        out = vae_fused.normed_conv(self.conv_out, self.norm_out, x, slab)
        return vae_fused.biased(self.conv_out, out)


class Decoder(nn.Module):
    """Latents [B, Z, T, H, W] after `post_quant_conv` -> frames [B, 3, T', 8H, 8W], not clamped."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in reversed(config.dim_mult)]
        upsamples = [
            Upsample(dim, doubles) for dim, doubles in zip(dims, reversed(config.temperal_downsample), strict=False)
        ]
        in_dims = [dims[0]] + [dim // 2 for dim in dims[:-1]]  # an upsampling halves the channels
        self.conv_in = CausalConv3d(config.z_dim, dims[0])
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(in_dim, out_dim, config.num_res_blocks, upsample)
            for in_dim, out_dim, upsample in zip(in_dims, dims, (*upsamples, None), strict=True)
        )
        self.norm_out = NormSilu(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], _RGB)

    def forward(self, x: Tensor, slab: Slab) -> Tensor:
        x = self.conv_in(x, slab)
        x = self.mid_block(x, slab)
        for block in self.up_blocks:
            x = block(x, slab)
        out: Tensor = self.conv_out(self.norm_out(x, slab), slab)
        return out

    def fused(self, x: Tensor, slab: Slab) -> Tensor:
        """The same with channels last; needs weights in that layout."""
        x = vae_fused.causal_conv(self.conv_in, x, slab)
        x = vae_fused.mid_block(self.mid_block, x, slab)
        for block in self.up_blocks:
            assert isinstance(block, UpBlock)
            for layer in (*block.resnets, *block.upsamplers):
                x = vae_fused.up_layer(layer, x, slab)
        out = vae_fused.normed_conv(self.conv_out, self.norm_out, x, slab)
        return vae_fused.biased(self.conv_out, out)


def _slabs(
    num_latent_frames: int, slab_frames: int | None, columns: WidthShard, *, keeps_sum_order: bool
) -> Iterator[tuple[int, int, Slab]]:
    """First and end latent frame of each slab of a clip, with the slab."""
    assert slab_frames is None or slab_frames > 0, f"slab_frames {slab_frames}: must be positive or None"
    starts = [0] if slab_frames is None else [0, *range(1, num_latent_frames, slab_frames)]
    tails: dict[nn.Module, Tensor] = {}
    for start, end in pairwise([*starts, num_latent_frames]):
        slab = Slab(
            is_first=start == 0,
            is_last=end == num_latent_frames,
            keeps_sum_order=keeps_sum_order,
            tails=tails,
            columns=columns,
        )
        yield start, end, slab


def _list(config: Mapping[str, object], key: str, default: tuple[_T, ...], kind: type[_T]) -> tuple[_T, ...]:
    value = config.get(key, default)
    entries = value if isinstance(value, list | tuple) else [None]
    right = f"it must be a list of {kind.__name__}"
    require(all(type(entry) is kind for entry in entries), _FILE, key, value, right)
    return tuple(entries)
