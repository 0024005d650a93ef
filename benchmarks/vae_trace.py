"""What a decode of a chunk calls, reads, writes and computes at the 14B model's VAE, counted on tensors without memory.

Knows operators and shapes; knows no time.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios_serve.model_executor.vae import VaeConfig, VaeOptions, WanVAE

LATENTS = (1, 16, 9, 48, 80)  # of 33 frames of 640x384
PIXELS = (1, 3, 33, 384, 640)
VIEWS = {
    *("permute", "view", "slice", "transpose", "split", "unbind", "t", "select", "unsqueeze", "squeeze", "alias"),
    *("_unsafe_view", "empty", "empty_like", "detach"),
}
WHOLE = {"linear", "scaled_dot_product_attention", "_upsample_nearest_exact2d"}
"""Composite operators that are one call to a library; others are taken apart, so that a copy inside them is seen."""


class Trace(TorchDispatchMode):
    """Calls of operators that are no views, the bytes that each one reads and writes, and operations in all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        return int(2 * result.numel() * args[1][0].numel())
    if name == "scaled_dot_product_attention":
        return int(4 * args[0].numel() * args[1].shape[-2])
    return 0


@cache
def trace_decode(options: VaeOptions) -> Trace:
    """Of one chunk at 640x384."""
    with torch.device("meta"):
        vae = WanVAE(VaeConfig(), options).requires_grad_(False)
    vae.prepare()
    trace = Trace()
    with torch.inference_mode(), trace:
        frames = vae.decode(torch.empty(LATENTS, device="meta"))
    assert (frames.shape, frames.dtype) == (PIXELS, torch.bfloat16)
    return trace
