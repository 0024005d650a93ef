"""What a decode of a chunk does at the 14B model's VAE, counted without memory: operators, bytes, operations, and that
nothing waits for the device."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios_serve.kernels.yuv import rgb_to_yuv420
from helios_serve.model_executor.vae import VaeConfig, VaeOptions, WanVAE

BF16 = VaeOptions.on(torch.device("cuda"))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


LATENTS = (1, 16, 9, 48, 80)  # of 33 frames of 640x384
VIEWS = {
    *("permute", "view", "slice", "transpose", "split", "unbind", "t", "select", "unsqueeze", "squeeze", "alias"),
    *("_unsafe_view", "empty", "empty_like", "detach"),
}
WHOLE = {"linear", "scaled_dot_product_attention", "_upsample_nearest_exact2d"}
"""Composite operators that are one call to a library; others are taken apart, so that a copy inside them is seen."""


class Trace(TorchDispatchMode):
    """Calls of operators that are no views, the bytes that each one reads and writes, and operations in all."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.traffic_bytes: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in WHOLE:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if name not in VIEWS:
            self.calls[name] += 1
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            fresh = [value for value in tree_leaves(result) if isinstance(value, Tensor) and not _is_in(value, given)]
            self.traffic_bytes[name] += sum(value.nbytes for value in (*given, *fresh))
        if name == "vae_add_bias":
            self.traffic_bytes[name] += args[0].nbytes  # is read and written
        self.flops += _flops(name, args, result)
        return result


def _is_in(value: Tensor, given: list[Tensor]) -> bool:
    return any(value is one for one in given)


def _flops(name: str, args: Any, result: Any) -> int:
    if name in ("vae_convolve", "linear"):
        return 2 * result.numel() * args[1][0].numel()
    if name == "scaled_dot_product_attention":
        return 4 * args[0].numel() * args[1].shape[-2]
    return 0


@functools.cache
def traced(options: VaeOptions) -> Trace:
    with torch.device("meta"):
        vae = WanVAE(VaeConfig(), options).requires_grad_(False)
    vae.prepare()
    with Trace() as trace:
        frames = vae.decode(torch.empty(LATENTS, device="meta"))
    assert (frames.shape, frames.dtype) == ((1, 3, 33, 384, 640), torch.bfloat16)
    return trace


FOLDED_BF16 = VaeOptions(precision="bf16", layout="channels_last", is_upsample_folded=True)
SLABS = VaeOptions(precision="bf16", layout="channels_last", slab_frames=4, is_upsample_folded=True)
UNFOLDED_BF16 = VaeOptions(precision="bf16", layout="channels_last")


OPTIONS = {"windowed": BF16, "folded": FOLDED_BF16, "slabs": SLABS, "unfolded": UNFOLDED_BF16}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_padded_joined_or_cloned(options: VaeOptions) -> None:
    trace = traced(options)
    assert trace.calls.keys() <= {
        *("vae_convolve", "vae_norm_rows", "vae_norm_windows", "vae_add_bias", "vae_place_with_bias"),
        "_upsample_nearest_exact2d",
        *("linear", "scaled_dot_product_attention", "copy_", "zero_", "clamp", "_to_copy"),
    }
    assert trace.calls["_to_copy"] == 1  # the latents on their way in


def test_operations_are_those_of_the_model() -> None:
    """PERFORMANCE.md, section 2: 69.26 TF; folding replaces 5.7 TF by 2.5 and the line and column that it adds."""
    assert traced(UNFOLDED_BF16).flops == pytest.approx(69.26e12, rel=2e-4)
    saved = traced(UNFOLDED_BF16).flops - traced(FOLDED_BF16).flops
    assert saved == pytest.approx(5.7e12 - 2.5e12, rel=0.05)


def test_launches_of_a_decode() -> None:
    whole = traced(BF16).calls
    assert (whole["vae_convolve"], whole["vae_norm_rows"] + whole["vae_norm_windows"]) == (35, 30)
    assert sum(whole.values()) <= 125
    assert sum(traced(SLABS).calls.values()) <= 3 * 140


def test_traffic_of_a_decode() -> None:
    """Convolutions and norms are PERFORMANCE.md's 75 to 87 GB; biases, residuals and phases come to them."""
    gigabytes = {name: count / 1e9 for name, count in traced(FOLDED_BF16).traffic_bytes.items()}
    unfolded = {name: count / 1e9 for name, count in traced(UNFOLDED_BF16).traffic_bytes.items()}
    assert 33.88 < gigabytes["vae_norm_rows"] < 33.88 + 1.25  # spare frames are written, too
    assert 75 < unfolded["vae_convolve"] + unfolded["vae_norm_rows"] < 87
    assert gigabytes["vae_convolve"] < unfolded["vae_convolve"] - 3
    assert gigabytes["vae_add_bias"] + gigabytes["vae_place_with_bias"] < 30
    assert gigabytes["copy_"] + gigabytes["zero_"] + gigabytes["_to_copy"] + gigabytes["clamp"] < 1
    assert sum(gigabytes.values()) < 105
    assert traced(SLABS).traffic_bytes.total() < 1.12 * traced(FOLDED_BF16).traffic_bytes.total()
    # Windows hold each frame three times: they are written, and read by the convolution.
    assert 140 < traced(BF16).traffic_bytes.total() / 1e9 < 155
    assert traced(BF16).flops == pytest.approx(traced(FOLDED_BF16).flops, rel=1e-9)


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
