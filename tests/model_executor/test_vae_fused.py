"""The VAE with channels last: equal to the plain one, mutants of its edges, preparation."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helios_serve.kernels.vae_epilogue import launch_add_bias, launch_place_with_bias
from helios_serve.kernels.vae_norm_silu import launch_norm_rows, launch_norm_windows
from helios_serve.model_executor import vae_fused
from helios_serve.model_executor.vae import PARITY, VaeConfig, VaeOptions, WanVAE
from helios_serve.model_executor.vae_layers import CausalConv3d, Slab, Upsample

CONFIG = VaeConfig(base_dim=8)
UNFOLDED = VaeOptions(layout="channels_last")
FOLDED = VaeOptions(layout="channels_last", is_upsample_folded=True)
WINDOWED = VaeOptions(
    layout="channels_last", is_upsample_folded=True, windowed_channels=(8, 32), windowed_encoder_channels=(8, 16)
)
BF16 = VaeOptions.on(torch.device("cuda"))
EACH = pytest.mark.parametrize("options", [UNFOLDED, FOLDED, WINDOWED], ids=["unfolded", "folded", "windowed"])
CLEARLY_WRONG = 1e-2  # outputs are of the order of 0.3
EXACT = 1e-12
STOCK = 1e-6  # the reference upsamples in float32


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@functools.cache
def stock(dtype: torch.dtype = torch.float64) -> AutoencoderKLWan:
    """The reference with random weights."""
    with torch.inference_mode(False):
        made = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(11)
        for key, parameter in made.named_parameters():
            if key.endswith("gamma"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        made.decoder.conv_out.weight.mul_(0.4)  # keeps most pixels within the clamp
        return made.to(dtype)


@functools.cache
def ours(options: VaeOptions, dtype: torch.dtype = torch.float64) -> WanVAE:
    with torch.inference_mode(False):
        made = WanVAE(CONFIG, options).requires_grad_(False).to(dtype)
        made.load_state_dict(copy.deepcopy(stock().state_dict()))
        made.prepare()
        return made


def latents(num_frames: int, size: tuple[int, int] = (4, 6), num_clips: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(num_clips, 16, num_frames, *size, generator=generator, dtype=torch.float64)


def clip(channels: int, num_frames: int, num_clips: int = 2) -> Tensor:
    """Activations in the fused layout, of odd sides."""
    generator = torch.Generator().manual_seed(channels + num_frames)
    values = torch.randn(num_clips, channels, num_frames, 5, 7, generator=generator, dtype=torch.float64)
    return values.contiguous(memory_format=vae_fused.LAYOUT)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


def slab(*, is_first: bool = True, is_last: bool = True) -> Slab:
    return Slab(is_first=is_first, is_last=is_last, keeps_sum_order=False, tails={})


# Layers against the plain ones in float64


@EACH
@pytest.mark.parametrize("index", [(0, 0), (1, 0), (2, 0), (3, 1)], ids=str)
def test_residual_block(options: VaeOptions, index: tuple[int, int]) -> None:
    block = ours(options).decoder.up_blocks[index[0]].resnets[index[1]]
    assert (block.conv1.window_weight is not None) == (block.conv1.in_channels in options.windowed_channels)
    x = clip(block.conv1.in_channels, 3)
    out = vae_fused.residual_block(block, x, slab())
    assert distance(out, block(x, slab())) < EXACT


def test_attention_block() -> None:
    (block,) = ours(FOLDED).decoder.mid_block.attentions
    x = clip(32, 3)
    assert distance(vae_fused.attention_block(block, x), block(x, slab())) < EXACT


@EACH
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("is_first", "num_frames"), [(True, 1), (True, 4), (False, 3)])
def test_upsample(options: VaeOptions, level: int, is_first: bool, num_frames: int) -> None:
    (layer,) = ours(options).decoder.up_blocks[level].upsamplers
    assert (layer.folded_weight is not None) == options.is_upsample_folded
    x = clip(layer.resample[1].in_channels, num_frames)
    out = vae_fused.upsample(layer, x, slab(is_first=is_first))
    assert out.shape[3:] == (10, 14)
    assert distance(out, layer(x, slab(is_first=is_first))) < EXACT


def test_causal_and_pointwise_convolutions() -> None:
    vae = ours(FOLDED)
    x = clip(16, 3)
    assert distance(vae_fused.causal_conv(vae.decoder.conv_in, x, slab()), vae.decoder.conv_in(x, slab())) < EXACT
    assert distance(vae_fused.pointwise(vae.post_quant_conv, x), vae.post_quant_conv(x)) < EXACT


def test_tails_are_what_the_next_slab_needs_and_reuse_their_memory() -> None:
    conv, x = ours(FOLDED).decoder.conv_in, clip(16, 5, num_clips=1)
    whole, tails = vae_fused.causal_conv(conv, x, slab()), {}
    places, parts = set(), []
    for start, end in ((0, 1), (1, 3), (3, 4), (4, 5)):
        part = Slab(is_first=start == 0, is_last=end == 5, keeps_sum_order=False, tails=tails)
        parts.append(vae_fused.causal_conv(conv, x[:, :, start:end], part))
        places |= {tail.data_ptr() for tail in tails.values()}
    assert distance(torch.cat(parts, dim=2), whole) < EXACT
    assert not tails
    assert len(places) == 1


def is_causal(layer: nn.Module) -> TypeGuard[CausalConv3d]:
    return isinstance(layer, CausalConv3d)


# Whole decodes


@EACH
@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_decode_equals_reference(options: VaeOptions, num_frames: int) -> None:
    z = latents(num_frames)
    frames = ours(options).decode(z)
    assert frames.is_contiguous(memory_format=vae_fused.LAYOUT)
    assert frames.std() > 0.05
    assert distance(frames, stock().decode(z).sample) < STOCK


@EACH
@pytest.mark.parametrize("slab_frames", [8, 4, 3, 2, 1])
def test_slabs_equal_whole_clip(options: VaeOptions, slab_frames: int) -> None:
    vae, z = ours(options), latents(9, (2, 3))
    assert distance(vae.decode(z, slab_frames), vae.decode(z)) < EXACT


@settings(max_examples=10, deadline=None)
@given(
    num_frames=st.integers(1, 5),
    slab_frames=st.integers(1, 5),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    num_clips=st.integers(1, 2),
    options=st.sampled_from([FOLDED, WINDOWED]),
)
def test_any_slabs_equal_the_plain_decoder(
    num_frames: int, slab_frames: int, height: int, width: int, num_clips: int, options: VaeOptions
) -> None:
    z = latents(num_frames, (height, width), num_clips)
    assert distance(ours(options).decode(z, slab_frames), ours(PARITY).decode(z)) < EXACT


@pytest.mark.parametrize("slab_frames", [None, 2, 1])
@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_encode_equals_reference(num_frames: int, slab_frames: int | None) -> None:
    frames = torch.rand(2, 3, num_frames, 16, 24, dtype=torch.float64) * 2 - 1
    theirs = stock().encode(frames).latent_dist
    mean, logvar = ours(WINDOWED).encode(frames, slab_frames)
    assert sum(conv.window_weight is not None for conv in ours(WINDOWED).encoder.modules() if is_causal(conv)) == 9
    assert mean.std() > 0.05
    assert distance(mean, theirs.mean) < EXACT
    assert distance(logvar.clamp(-30, 20), theirs.logvar) < EXACT


def test_options_say_how_long_slabs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    vae = ours(VaeOptions(layout="channels_last", slab_frames=3))

    def spy(x: Tensor, part: Slab) -> Tensor:
        lengths.append(x.shape[2])
        return fused(x, part)

    fused = vae.decoder.fused
    monkeypatch.setattr(vae.decoder, "fused", spy)
    vae.decode(latents(9, (1, 1)))
    assert lengths == [1, 3, 3, 2]


def test_a_clip_leaves_nothing_behind() -> None:
    vae, z = ours(FOLDED), latents(3)
    alone = vae.decode(z, 1)
    vae.decode(latents(2), 1)
    assert torch.equal(vae.decode(z, 1), alone)


@pytest.mark.parametrize("is_folded", [False, True])
def test_bf16_is_no_farther_from_float64_than_the_stock_decoder(is_folded: bool) -> None:
    channels = (8, 16, 32) if is_folded else ()
    options = VaeOptions(
        precision="bf16", layout="channels_last", is_upsample_folded=is_folded, windowed_channels=channels
    )
    z = latents(3)
    exact = stock().decode(z).sample
    theirs = (stock(torch.bfloat16).decode(z.bfloat16()).sample.double() - exact).square().mean((0, 1, 3, 4)).sqrt()
    frames = ours(options, torch.float32).decode(z.float())
    assert frames.dtype == torch.bfloat16
    error = (frames.double() - exact).square().mean((0, 1, 3, 4)).sqrt()
    assert error.mean() <= 1.05 * theirs.mean(), (error, theirs)
    assert error.max() <= 1.05 * theirs.max(), (error, theirs)


def test_kernels_decode_slabs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")
    z = latents(2, (2, 3)).float()
    expected = ours(WINDOWED, torch.float32).decode(z, 1)
    called: Counter[str] = Counter()

    def counted(launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            called[launch.__name__] += 1
            return launch(*arguments)

        return run

    monkeypatch.setattr(vae_fused, "norm_rows", counted(launch_norm_rows))
    monkeypatch.setattr(vae_fused, "norm_windows", counted(launch_norm_windows))
    monkeypatch.setattr(vae_fused, "add_bias", counted(launch_add_bias))
    monkeypatch.setattr(vae_fused, "place_with_bias", counted(launch_place_with_bias))
    frames = ours(WINDOWED, torch.float32).decode(z, 1)
    assert called == {
        "launch_norm_rows": 16,
        "launch_norm_windows": 44,
        "launch_add_bias": 34,
        "launch_place_with_bias": 28,
    }
    assert distance(frames, expected) < 1e-5
    assert distance(frames, stock().decode(z.double()).sample) < 1e-5


# Mutants: each of these looks plausible and must differ


def frame_0_as_left_context(time_conv: CausalConv3d, x: Tensor, part: Slab) -> Tensor:
    padded = torch.cat((torch.zeros_like(x[:, :, :1]), x), dim=2)
    doubled = nn.Conv3d.forward(time_conv, padded)
    interleaved = torch.stack(doubled.chunk(2, dim=1), dim=3).flatten(2, 3)
    return torch.cat((x[:, :, :1], interleaved), dim=2).contiguous(memory_format=vae_fused.LAYOUT)


def frame_0_doubled(time_conv: CausalConv3d, x: Tensor, part: Slab) -> Tensor:
    doubled = vae_fused.causal_conv(time_conv, x, part)
    interleaved = torch.stack(doubled.chunk(2, dim=1), dim=3).flatten(2, 3)[:, :, 1:]
    return interleaved.contiguous(memory_format=vae_fused.LAYOUT)


def replicate_padding(*arguments: Any) -> None:
    """The first frame stands where zeros belong."""
    real_norm_rows(*arguments)
    x, out = arguments[0], arguments[-1]
    frame = (out.shape[1] - x.shape[1]) // 2
    if frame and arguments[3] is None:
        out[:, : 2 * frame] = out[:, 2 * frame : 3 * frame].repeat(1, 2, 1)


def forgotten_context(*arguments: Any) -> None:
    real_norm_rows(*arguments[:3], None, *arguments[4:])


real_norm_rows = vae_fused.norm_rows


@pytest.mark.parametrize(
    ("function", "mutant"),
    [
        ("double_frames", frame_0_as_left_context),
        ("double_frames", frame_0_doubled),
        ("norm_rows", replicate_padding),
        ("norm_rows", forgotten_context),
    ],
    ids=["left-context", "frame-0-doubled", "replicate", "slab-without-context"],
)
def test_mutants_of_the_edges_are_rejected(monkeypatch: pytest.MonkeyPatch, function: str, mutant: Any) -> None:
    z = latents(3)
    expected = ours(PARITY).decode(z)
    slab_frames = 1 if mutant is forgotten_context else None
    assert distance(ours(FOLDED).decode(z, slab_frames), expected) < EXACT
    monkeypatch.setattr(vae_fused, function, mutant)
    assert distance(ours(FOLDED).decode(z, slab_frames), expected) > CLEARLY_WRONG


def _exchange_lines_and_columns(folded: Tensor) -> Tensor:
    return torch.cat([folded.chunk(4)[index] for index in (0, 2, 1, 3)])


def _one_phase_for_all(folded: Tensor) -> Tensor:
    return folded.chunk(4)[0].repeat(4, 1, 1, 1)


@pytest.mark.parametrize("mutate", [_exchange_lines_and_columns, _one_phase_for_all])
def test_mutants_of_the_fold_are_rejected(monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Tensor], Tensor]) -> None:
    (layer,) = ours(FOLDED).decoder.up_blocks[2].upsamplers
    x = clip(layer.resample[1].in_channels, 1)
    monkeypatch.setattr(layer, "folded_weight", mutate(layer.folded_weight))
    assert distance(vae_fused.upsample(layer, x, slab()), layer(x, slab())) > CLEARLY_WRONG


def test_a_layer_that_loses_the_layout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = vae_fused.convolve
    monkeypatch.setattr(vae_fused, "convolve", lambda *arguments: plain(*arguments).contiguous())
    with pytest.raises(AssertionError, match="channels must be last"):
        ours(FOLDED).decode(latents(2))


# Preparation


def test_only_the_decoder_changes_and_its_sums_are_rounded_once() -> None:
    plain, fast = ours(PARITY, torch.float32), ours(BF16, torch.float32)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert not list(fast.buffers())
    for name, parameter in fast.named_parameters():
        is_decoder = name.startswith(("decoder.", "post_quant_conv."))
        assert parameter.dtype == (torch.bfloat16 if is_decoder else torch.float32), name
        assert torch.equal(parameter, plain.get_parameter(name).to(parameter.dtype)), name
    frames = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    for encoded, expected in zip(fast.encode(frames), plain.encode(frames), strict=True):
        assert torch.equal(encoded, expected)
    folds = [layer for layer in fast.decoder.modules() if isinstance(layer, Upsample)]
    assert len(folds) == 3
    for layer in folds:
        exact = vae_fused.fold_upsample(stock().get_parameter(_name_of(fast, layer) + ".resample.1.weight"))
        assert (layer.folded_weight.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
        twice = vae_fused.fold_upsample(layer.resample[1].weight).bfloat16()
        assert not torch.equal(layer.folded_weight, twice), "sums were made of rounded weights"


def _name_of(module: nn.Module, layer: nn.Module) -> str:
    return next(name for name, one in module.named_modules() if one is layer)


def test_windows_are_the_frames_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames in another order, or a window that ends a frame early, must differ."""
    conv, z = ours(WINDOWED).decoder.up_blocks[3].resnets[0].conv1, latents(2)
    expected = ours(PARITY).decode(z)
    assert distance(ours(WINDOWED).decode(z), expected) < EXACT
    monkeypatch.setattr(conv, "window_weight", torch.cat(conv.window_weight.chunk(3, dim=1)[::-1], dim=1))
    assert distance(ours(WINDOWED).decode(z), expected) > CLEARLY_WRONG


def test_defaults_are_parity_on_cpu_and_bf16_on_cuda() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert VaeOptions.on(cpu) == VaeOptions() == PARITY
    assert VaeOptions.on(cuda) == VaeOptions.on(cpu, "bf16")
    assert (BF16.precision, BF16.layout, BF16.is_upsample_folded) == ("bf16", "channels_last", True)
    exact = VaeOptions.on(cuda, "fp32")
    assert (exact.precision, exact.layout, exact.is_upsample_folded) == ("fp32", "channels_last", False)
    with pytest.raises(AssertionError, match="bf16"):
        VaeOptions(precision="bf16")
    with pytest.raises(AssertionError, match="folded"):
        VaeOptions(is_upsample_folded=True)
    with pytest.raises(AssertionError, match="windows"):
        VaeOptions(windowed_channels=(8,))


def test_parity_options_leave_the_module_as_it_was() -> None:
    vae = ours(PARITY, torch.float32)
    assert all(layer.folded_weight is None for layer in vae.modules() if isinstance(layer, Upsample))
    assert all(parameter.is_contiguous() for parameter in vae.parameters())
