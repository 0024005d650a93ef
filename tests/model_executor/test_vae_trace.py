"""What a decode of a chunk does at the 14B model's VAE, counted without memory: operators, bytes, operations, and that
nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.vae_trace import Trace, trace_decode
from helios_serve.kernels.yuv import rgb_to_yuv420
from helios_serve.model_executor.vae import VaeConfig, VaeOptions, WanVAE

BF16 = VaeOptions.on(torch.device("cuda"))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


FOLDED_BF16 = VaeOptions(precision="bf16", layout="channels_last", is_upsample_folded=True)
SLABS = VaeOptions(precision="bf16", layout="channels_last", slab_frames=4, is_upsample_folded=True)
UNFOLDED_BF16 = VaeOptions(precision="bf16", layout="channels_last")


OPTIONS = {"windowed": BF16, "folded": FOLDED_BF16, "slabs": SLABS, "unfolded": UNFOLDED_BF16}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_padded_joined_or_cloned(options: VaeOptions) -> None:
    trace = trace_decode(options)
    assert trace.calls.keys() <= {
        *("vae_convolve", "vae_norm_rows", "vae_norm_windows", "vae_add_bias", "vae_place_with_bias"),
        "_upsample_nearest_exact2d",
        *("linear", "scaled_dot_product_attention", "copy_", "zero_", "clamp", "_to_copy"),
    }
    assert trace.calls["_to_copy"] == 1  # the latents on their way in


def test_operations_are_those_of_the_model() -> None:
    """PERFORMANCE.md, section 2: 69.26 TF; folding replaces 5.7 TF by 2.5 and the line and column that it adds."""
    assert trace_decode(UNFOLDED_BF16).flops == pytest.approx(69.26e12, rel=2e-4)
    saved = trace_decode(UNFOLDED_BF16).flops - trace_decode(FOLDED_BF16).flops
    assert saved == pytest.approx(5.7e12 - 2.5e12, rel=0.05)


def test_launches_of_a_decode() -> None:
    whole = trace_decode(BF16).calls
    assert (whole["vae_convolve"], whole["vae_norm_rows"] + whole["vae_norm_windows"]) == (35, 30)
    assert sum(whole.values()) <= 125
    assert sum(trace_decode(SLABS).calls.values()) <= 3 * 140


def test_traffic_of_a_decode() -> None:
    """Convolutions and norms are PERFORMANCE.md's 75 to 87 GB; biases, residuals and phases come to them."""
    gigabytes = {name: count / 1e9 for name, count in trace_decode(FOLDED_BF16).traffic_bytes.items()}
    unfolded = {name: count / 1e9 for name, count in trace_decode(UNFOLDED_BF16).traffic_bytes.items()}
    assert 33.88 < gigabytes["vae_norm_rows"] < 33.88 + 1.25  # spare frames are written, too
    assert 75 < unfolded["vae_convolve"] + unfolded["vae_norm_rows"] < 87
    assert gigabytes["vae_convolve"] < unfolded["vae_convolve"] - 3
    assert gigabytes["vae_add_bias"] + gigabytes["vae_place_with_bias"] < 30
    assert gigabytes["copy_"] + gigabytes["zero_"] + gigabytes["_to_copy"] + gigabytes["clamp"] < 1
    assert sum(gigabytes.values()) < 105
    assert trace_decode(SLABS).traffic_bytes.total() < 1.12 * trace_decode(FOLDED_BF16).traffic_bytes.total()
    # Windows hold each frame three times: they are written, and read by the convolution.
    assert 140 < trace_decode(BF16).traffic_bytes.total() / 1e9 < 155
    assert trace_decode(BF16).flops == pytest.approx(trace_decode(FOLDED_BF16).flops, rel=1e-9)


def test_nothing_from_latents_to_bytes_waits_for_the_device() -> None:
    """Tensors without memory stand for a device whose values never come back: reading one raises."""
    with torch.device("meta"):
        vae = WanVAE(VaeConfig(base_dim=8), SLABS).requires_grad_(False)
        z = torch.empty(1, 16, 9, 4, 6)
    vae.prepare()
    with Trace() as trace:
        frames = vae.decode(vae.denormalize(z))
        pictures = rgb_to_yuv420(frames[0].transpose(0, 1))
    assert pictures.is_meta
    assert pictures.shape == (33, 48, 48)
    assert trace.calls["rgb_to_yuv420"] == 1
