"""What results are compared with, and how far apart two of them are.

Knows the same functions in float32 and by PyTorch's plain operators; says nothing of how far apart is too far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import random_model
from helios_serve import kernels
from helios_serve.kernels import reference
from helios_serve.model_executor import layers
from helios_serve.model_executor.layers import Block
from helios_serve.model_executor.packing import PackedText
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import WanVAE


class Wide(HeliosTransformer):
    """The same function in float32; its blocks are widened one at a time, as two models fill a card."""

    def __init__(self, narrow: HeliosTransformer) -> None:
        with torch.device("meta"):
            super().__init__(random_model.with_layers(narrow.config, 0))
        self.config = narrow.config
        for name, child in narrow.named_children():
            if child is not narrow.blocks:
                setattr(self, name, copy.deepcopy(child).float())
        self.scale_shift_tables = narrow.scale_shift_tables
        self._narrow_blocks = tuple(narrow.blocks)

    def _each_block(self) -> Iterator[Block]:
        for block in self._narrow_blocks:
            assert isinstance(block, Block)
            yield copy.deepcopy(block).float()


@contextmanager
def plain_operators() -> Iterator[None]:
    """Lets the transformer use the definitions in place of kernels, and PyTorch's attention."""
    shared = [name for name in kernels.__all__ if name in vars(reference) and name != "attend"]
    plain: dict[str, Any] = {name: vars(reference)[name] for name in shared}
    with (
        mock.patch.multiple(kernels, attend=attend_plainly, **plain),
        mock.patch.object(layers, "cross_attend", _cross_attend_plainly),
    ):
        yield


def _cross_attend_plainly(q: Tensor, text: PackedText, layer: int) -> Tensor:
    assert all(repeats == 1 for repeats in text.repeats)
    keys, values = ([one[layer] for one in tensors] for tensors in (text.keys, text.values))
    cu_k = (0, *accumulate(len(one) for one in keys))
    segments = kernels.Segments(cu_q=text.cu_q, cu_k=cu_k, scale=text.scale)
    return attend_plainly(q, torch.cat(keys), torch.cat(values), segments)[0]


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, segments: kernels.Segments) -> tuple[Tensor, Tensor | None]:
    """Segment by segment; written out for float32 and float64, which then is the exact result."""
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(pairwise(segments.cu_q), pairwise(segments.cu_k), strict=True):
        parts = (q[q0:q1], k[k0:k1], v[k0:k1])
        if q.dtype == torch.bfloat16:
            q_heads, k_heads, v_heads = (part.transpose(0, 1)[None] for part in parts)  # (1, H, N, Dh)
            out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, scale=segments.scale)
            outs.append(out[0].transpose(0, 1))
            continue
        out, lse = reference.attend(*parts, segments.scale)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1) if lses else None


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions in float32 proper, not in the matrix units' shorter format."""
    before = torch.backends.cudnn.allow_tf32  # products are in float32 proper unless somebody asks for less
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def in_bfloat16(vae: WanVAE) -> WanVAE:
    """All weights rounded, and no layer fused: what a plain port of the reference would decode with."""
    return copy.deepcopy(vae).bfloat16()


def distance(actual: Tensor, wanted: Tensor) -> float:
    """|actual - wanted| / |wanted| over finite values; NaN when the others are not the same at the same places."""
    is_hole = ~wanted.isfinite()
    holes = [x.double()[is_hole] for x in (actual, wanted)]
    if not torch.equal(~actual.isfinite(), is_hole) or num_unequal(*holes):
        return math.nan
    ours, wide = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (actual, wanted))
    return float((ours - wide).norm() / wide.norm().clamp_min(1e-30))


def distances_by_frame(actual: Tensor, wanted: Tensor) -> list[float]:
    """Root mean square difference of each frame of [1, 3, F, H, W]."""
    return [float(mean.sqrt()) for mean in (actual.float() - wanted.float()).square().mean(dim=(0, 1, 3, 4))]


def num_unequal(actual: Tensor, wanted: Tensor) -> float:
    return float(((actual != wanted) & ~(actual.isnan() & wanted.isnan())).sum())


def units_apart(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference of bytes, or of e4m3 numbers in units of their last place."""
    return float((_codes(actual) - _codes(wanted)).abs().max())


def _codes(x: Tensor) -> Tensor:
    """Whole numbers in the order of the values."""
    bits = x.view(torch.uint8).int()
    return bits if x.dtype == torch.uint8 else torch.where(bits < 128, bits, 128 - bits)


def flatness(x: Tensor) -> float:
    """0 for a finite tensor that is not constant, else NaN."""
    is_fine = bool(x.isfinite().all()) and float(x.float().std()) > 1e-3
    return 0.0 if is_fine else math.nan
