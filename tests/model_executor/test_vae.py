"""The Wan VAE against diffusers, its slabs against the whole clip, and mutants of its temporal edges."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helios_serve.errors import CheckpointError
from helios_serve.kernels import rms_norm_silu, vae_rms_norm
from helios_serve.model_executor.vae import VaeConfig, WanVAE, sample_posterior
from helios_serve.model_executor.vae_layers import CausalConv3d, Downsample, Slab, Upsample

TINY = {"base_dim": 8}
OTHER = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 3, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 2.5, 0.7, 1.0],
    "scale_factor_spatial": 4,
}
CONFIGS = pytest.mark.parametrize("config", [TINY, OTHER], ids=["default-mult", "other-mult"])
CLEARLY_WRONG = 1e-2  # outputs are of the order of 0.3, agreement is 1e-5

Pair = tuple[AutoencoderKLWan, WanVAE]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def pair(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Pair:
    """The reference and ours with the same random weights; the two are shared by all tests."""
    return _pair("tiny" if config is TINY else "other", dtype)


@functools.cache
def _pair(name: str, dtype: torch.dtype) -> Pair:
    config = TINY if name == "tiny" else OTHER
    with torch.inference_mode(False):
        reference = AutoencoderKLWan(**config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(7)
        for key, parameter in reference.named_parameters():
            if key.endswith("gamma"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        reference.decoder.conv_out.weight.mul_(0.4)  # keeps most pixels within the clamp
        ours = WanVAE(VaeConfig.from_json(config)).requires_grad_(False)
        ours.load_state_dict(copy.deepcopy(reference.state_dict()))
    return reference.to(dtype), ours.to(dtype)


def latents(config: dict[str, Any], num_frames: int, size: tuple[int, int] = (4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(1, VaeConfig.from_json(config).z_dim, num_frames, *size, generator=generator)


def pixels(num_frames: int, size: tuple[int, int] = (16, 24), num_clips: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(num_clips, 3, num_frames, *size, generator=generator) * 2 - 1


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def encode_distance(config: dict[str, Any], frames: Tensor) -> float:
    reference, ours = pair(config)
    expected = reference.encode(frames).latent_dist
    mean, logvar = ours.encode(frames)
    return max(distance(mean, expected.mean), distance(logvar.clamp(-30, 20), expected.logvar))


# Parameters


@CONFIGS
def test_parameters_of_small_configs_are_the_checkpoints(config: dict[str, Any]) -> None:
    reference, ours = pair(config)
    assert shapes(ours) == shapes(reference)


def test_default_config_is_buildable_without_memory_and_has_the_checkpoints_parameters() -> None:
    with torch.device("meta"):
        ours, reference = WanVAE(VaeConfig()), AutoencoderKLWan()
    assert shapes(ours) == shapes(reference)
    assert sum(p.numel() for p in ours.parameters()) == 126_892_531
    assert all(p.is_meta for p in ours.parameters())
    assert not list(ours.buffers())


def shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


# Whole clips against the reference


@CONFIGS
@pytest.mark.parametrize("num_frames", [1, 2, 3, 9])
def test_decode_equals_reference(config: dict[str, Any], num_frames: int) -> None:
    reference, ours = pair(config)
    z = latents(config, num_frames)
    frames = ours.decode(z)
    scale = ours.config.scale_factor_spatial
    assert frames.shape == (1, 3, 1 + 4 * (num_frames - 1), 4 * scale, 6 * scale)
    assert frames.std() > 0.1
    assert distance(frames, reference.decode(z).sample) < 1e-5


@CONFIGS
@pytest.mark.parametrize("num_frames", [1, 5, 33])
def test_encode_equals_reference(config: dict[str, Any], num_frames: int) -> None:
    frames = pixels(num_frames)
    mean, _ = pair(config)[1].encode(frames)
    assert mean.shape[2] == 1 + (num_frames - 1) // 4
    assert mean.std() > 0.1
    assert encode_distance(config, frames) < 1e-5


def test_odd_grids_and_several_clips_equal_reference() -> None:
    reference, ours = pair(TINY)
    z = torch.cat([latents(TINY, 2, (5, 7)), latents(TINY, 2, (5, 7)) * 0.5])
    assert distance(ours.decode(z), reference.decode(z).sample) < 1e-5
    assert encode_distance(TINY, pixels(5, (40, 56), num_clips=2)) < 1e-5


def test_wide_grid_equals_reference() -> None:
    reference, ours = pair(TINY)
    z = latents(TINY, 3, (6, 10))
    assert distance(ours.decode(z), reference.decode(z).sample) < 1e-5


def test_decode_clamps() -> None:
    _, ours = pair(TINY)
    z = latents(TINY, 2)
    louder = copy.deepcopy(ours)
    louder.decoder.conv_out.weight.mul_(20.0)
    frames = louder.decode(z)
    assert (frames.min(), frames.max()) == (-1.0, 1.0)


# Slabs


@pytest.mark.parametrize("slab_frames", [8, 4, 3, 2, 1, 20])  # [1,8] [1,4,4] [1,3,3,2] [1,2,2,2,2] [1]*9 [1,8]
def test_decode_slabs_equal_whole_clip(slab_frames: int) -> None:
    _, ours = pair(TINY, torch.float64)
    z = latents(TINY, 9).double()
    assert distance(ours.decode(z, slab_frames), _whole_decode()) < 1e-12


@functools.cache
def _whole_decode() -> Tensor:
    return pair(TINY, torch.float64)[1].decode(latents(TINY, 9).double())


@pytest.mark.parametrize("slab_frames", [4, 3, 1])
def test_encode_slabs_equal_whole_clip(slab_frames: int) -> None:
    _, ours = pair(TINY, torch.float64)
    frames = pixels(33).double()
    for sliced, whole in zip(ours.encode(frames, slab_frames), ours.encode(frames), strict=True):
        assert distance(sliced, whole) < 1e-12


@settings(max_examples=15, deadline=None)
@given(
    num_frames=st.integers(1, 6),
    slab_frames=st.integers(1, 6),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    num_clips=st.integers(1, 2),
)
def test_any_slabs_equal_whole_clip(num_frames: int, slab_frames: int, height: int, width: int, num_clips: int) -> None:
    _, ours = pair(OTHER, torch.float64)
    z = latents(OTHER, num_frames, (height, width)).double().repeat(num_clips, 1, 1, 1, 1)
    assert distance(ours.decode(z, slab_frames), ours.decode(z)) < 1e-12
    frames = pixels(1 + 4 * (num_frames - 1), (4 * height, 4 * width), num_clips).double()
    assert distance(ours.encode(frames, slab_frames)[0], ours.encode(frames)[0]) < 1e-12


def test_slabs_convolve_no_more_frames_than_they_hold_and_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds memory: the first slab is one latent frame, later ones are as long as asked for."""
    _, ours = pair(TINY)
    lengths: list[int] = []

    def spy(conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
        if conv is ours.decoder.conv_in:
            lengths.append(x.shape[2])
            assert slab.is_first == (len(lengths) == 1)
        return causal(conv, x, slab)

    causal = CausalConv3d.forward
    monkeypatch.setattr(CausalConv3d, "forward", spy)
    ours.decode(latents(TINY, 9, (1, 1)), slab_frames=3)
    assert lengths == [1, 3, 3, 2]


def test_a_clip_leaves_nothing_behind() -> None:
    _, ours = pair(TINY)
    z = latents(TINY, 3)
    alone = ours.decode(z, 1)
    ours.decode(latents(TINY, 2), 1)
    assert torch.equal(ours.decode(z, 1), alone)


def test_tails_are_copies_and_are_dropped_at_the_end() -> None:
    conv, tails = nn.Identity(), {}
    x = torch.randn(1, 2, 5, 3, 3)
    Slab(is_first=True, is_last=False, keeps_sum_order=False, tails=tails).leave(conv, x, 2)
    assert torch.equal(tails[conv], x[:, :, 3:])
    assert tails[conv].untyped_storage().nbytes() == tails[conv].nbytes
    last = Slab(is_first=False, is_last=True, keeps_sum_order=False, tails=tails)
    assert torch.equal(last.take(conv), x[:, :, 3:])
    last.leave(conv, x, 2)
    assert not tails


def test_wrong_lengths_are_refused() -> None:
    _, ours = pair(TINY)
    with pytest.raises(AssertionError, match="must be 1 \\+ 4k"):
        ours.encode(pixels(4))
    with pytest.raises(AssertionError, match="multiples of 8"):
        ours.encode(pixels(1, (16, 20)))
    with pytest.raises(AssertionError, match="slab_frames 0"):
        ours.decode(latents(TINY, 2), 0)


# Mutants: each of these looks plausible and must differ from the reference


def interleave(doubled: Tensor) -> Tensor:
    return torch.stack(doubled.chunk(2, dim=1), dim=3).flatten(2, 3)


def frame_0_as_left_context(time_conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
    padded = torch.cat((torch.zeros_like(x[:, :, :1]), x), dim=2)
    doubled = nn.Conv3d.forward(time_conv, padded)
    return torch.cat((x[:, :, :1], interleave(doubled)), dim=2)


def frame_0_doubled(time_conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
    return interleave(time_conv(x, slab))[:, :, 1:]


def frame_0_halved(time_conv: nn.Conv3d, x: Tensor, slab: Slab) -> Tensor:
    return time_conv(F.pad(x, (0, 0, 0, 0, 2, 0)))


def replicate_padding(conv: CausalConv3d, x: Tensor, slab: Slab) -> Tensor:
    pad = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    return F.conv3d(torch.cat((x[:, :, :1], x[:, :, :1], x), dim=2), conv.weight, conv.bias, padding=pad)


@pytest.mark.parametrize(
    ("layer", "method", "mutant"),
    [
        (Upsample, "_double_frames", staticmethod(frame_0_as_left_context)),
        (Upsample, "_double_frames", staticmethod(frame_0_doubled)),
        (CausalConv3d, "forward", replicate_padding),
    ],
    ids=["left-context", "frame-0-doubled", "replicate"],
)
def test_decode_mutants_are_rejected(
    monkeypatch: pytest.MonkeyPatch, layer: type[nn.Module], method: str, mutant: Any
) -> None:
    reference, ours = pair(TINY)
    z = latents(TINY, 3)
    expected = reference.decode(z).sample
    monkeypatch.setattr(layer, method, mutant)
    assert distance(ours.decode(z), expected) > CLEARLY_WRONG


@pytest.mark.parametrize(
    ("layer", "method", "mutant"),
    [
        (Downsample, "halve_frames", staticmethod(frame_0_halved)),
        (CausalConv3d, "forward", replicate_padding),
    ],
    ids=["frame-0-halved", "replicate"],
)
def test_encode_mutants_are_rejected(
    monkeypatch: pytest.MonkeyPatch, layer: type[nn.Module], method: str, mutant: Any
) -> None:
    monkeypatch.setattr(layer, method, mutant)
    assert encode_distance(TINY, pixels(9)) > CLEARLY_WRONG


# Dtypes, kernels, normalisation


def test_bf16_is_no_farther_from_float32_than_the_reference() -> None:
    exact = pair(TINY)[0].decode(latents(TINY, 3)).sample
    reference, ours = (copy.deepcopy(model).bfloat16() for model in pair(TINY))
    z = latents(TINY, 3).bfloat16()
    frames = ours.decode(z)
    assert frames.dtype == torch.bfloat16
    stock = (reference.decode(z).sample.float() - exact).square().mean().sqrt()
    assert (frames.float() - exact).square().mean().sqrt() <= 1.05 * stock
    mean, logvar = ours.encode(pixels(5).bfloat16(), slab_frames=1)
    assert mean.dtype == logvar.dtype == torch.bfloat16
    assert mean.isfinite().all()


def test_norms_equal_their_formula() -> None:
    x, gamma = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64), torch.rand(6, 1, 1, 1, dtype=torch.float64)
    x[0, :, 0, 0, 0] = 0.0
    mean_square = x.square().mean(1, keepdim=True).clamp_min(1e-24 / 6)
    normed = x * mean_square.rsqrt() * gamma
    assert distance(vae_rms_norm(x, gamma), normed) < 1e-14
    assert distance(rms_norm_silu(x, gamma), normed * normed.sigmoid()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalisation_equals_the_pipelines(dtype: torch.dtype) -> None:
    _, ours = pair(TINY)
    config = VaeConfig()
    z = torch.randn(2, 16, 3, 4, 5).to(dtype)
    mean = torch.tensor(config.latents_mean).view(1, 16, 1, 1, 1).to(dtype)
    reciprocal = 1.0 / torch.tensor(config.latents_std).view(1, 16, 1, 1, 1).to(dtype)
    assert torch.equal(ours.normalize(z), (z - mean) * reciprocal)
    assert torch.equal(ours.denormalize(z), z / reciprocal + mean)
    assert ours.denormalize(z).dtype == dtype


def test_posterior_sample_equals_reference() -> None:
    mean, logvar = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3) * 30
    expected = DiagonalGaussianDistribution(torch.cat((mean, logvar), 1)).sample(torch.Generator().manual_seed(3))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample_posterior(mean, logvar, noise), expected)


# Configuration


def test_config_defaults_are_the_references() -> None:
    with torch.device("meta"):
        published = dict(AutoencoderKLWan().config)
    assert VaeConfig.from_json(published) == VaeConfig.from_json({}) == VaeConfig()


def test_config_reads_values_and_skips_bookkeeping() -> None:
    config = VaeConfig.from_json(
        {
            **OTHER,
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": "0.37",
            "dropout": 0.1,
            "decoder_base_dim": 8,
        }
    )
    assert (config.base_dim, config.dim_mult, config.temperal_downsample) == (8, (1, 3, 2), (True, True))
    assert config.latents_std == (1.5, 2.5, 0.7, 1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_residual", True),
        ("patch_size", 2),
        ("attn_scales", [0.5]),
        ("decoder_base_dim", 256),
        ("_class_name", "AutoencoderKL"),
        ("in_channels", 12),
        ("out_channels", 4),
        ("base_dim", "96"),
        ("num_res_blocks", 0),
        ("z_dim", True),
        ("dim_mult", [1, 2.0, 4, 4]),
        ("dim_mult", 4),
        ("dim_mult", []),
        ("dim_mult", [1, 0, 4, 4]),
        ("temperal_downsample", [False, True]),
        ("temperal_downsample", [0, 1, 1]),
        ("latents_mean", [0.0]),
        ("latents_std", [0.0] * 16),
        ("scale_factor_spatial", 16),
        ("scale_factor_temporal", 8),
    ],
)
def test_config_names_the_key_that_is_not_served(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        VaeConfig.from_json({key: value})
    assert caught.value.param == key
