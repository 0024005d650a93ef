"""The work of a transformer forward on one rank of several, and the rates of a GPU at it, for `cp_model`.

Knows products, attention and fused operators of a layer, and what was measured of them on one GPU; knows no links and
no order of events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import outcome
from helios_serve.engine.step_cost import ModelShape
from helios_serve.parallel.shards import shard
from helios_serve.types import SamplingParams

STAGES = (0, 1, 2)
HEAD_DIM = 128
BF16_BYTES = 2
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (192, 128, 0.97), (128, 128, 0.93), (64, 256, 0.90))
_SMALL_TILES = ((128, 160, 0.95), (64, 128, 0.80), (64, 64, 0.62))
"""Lines, columns and quality of the tiles that a product is cut into, and of those for few rows."""
PRODUCT_FLOOR_S, ATTENTION_FLOOR_S, FUSED_FLOOR_S = 2e-6, 3e-6, 2.5e-6
"""Seconds of one launch beside what it computes."""
FUSED_BEFORE, FUSED_AFTER = 2, 7
"""Fused operators of a layer, before its attention and behind it."""

Product = tuple[int, int, int]
"""Rows, columns and inner length."""
Attention = tuple[int, int, int]
"""Queries, keys and heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Rates of one GPU: products and attention in operations per second at full tiles, fused operators and copies in
    bytes per second. factors: by stage, measured over modelled seconds of a forward on one rank."""

    product_flops_per_s: float
    attention_flops_per_s: float
    fused_bytes_per_s: float
    copy_bytes_per_s: float
    num_sms: int = 132
    factors: tuple[float, ...] = (1.0, 1.0, 1.0)

    def product_s(self, product: Product) -> float:
        m, n, k = product
        computed = full_tile_flops(product, self.num_sms) / self.product_flops_per_s
        return max(computed, BF16_BYTES * (m * k + n * k + m * n) / self.copy_bytes_per_s) + PRODUCT_FLOOR_S

    def attention_s(self, attention: Attention) -> float:
        return full_wave_flops(attention, self.num_sms) / self.attention_flops_per_s + ATTENTION_FLOOR_S

    def fused_s(self, num_bytes: float, launches: int) -> float:
        return num_bytes / self.fused_bytes_per_s + launches * FUSED_FLOOR_S


def full_tile_flops(product: Product, num_sms: int) -> float:
    """Operations of the tiles that a product occupies, over the quality of the best tile."""
    m, n, k = product
    waves = (
        math.ceil(math.ceil(m / lines) * math.ceil(n / columns) / num_sms) * lines * columns / quality
        for lines, columns, quality in (*_TILES, *_SMALL_TILES)
    )
    return 2 * k * num_sms * min(waves)


def full_wave_flops(attention: Attention, num_sms: int) -> float:
    """Operations of attention, over the share of the processors that its last wave leaves busy, three quarters at
    least, and of the time that a tile spends on keys."""
    queries, keys, heads = attention
    tiles = math.ceil(queries / 128) * heads
    busy = max(tiles / (math.ceil(tiles / num_sms) * num_sms), 0.75)
    return 4 * queries * keys * heads * HEAD_DIM * (keys + 180) / keys / busy


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer on one rank. rows, noisy: the tokens that it holds, and the current ones among them; of the last
    layer only these are needed, so that its queries are fewer."""

    shape: ModelShape
    degree: int
    rows: int
    noisy: int
    total: int
    total_noisy: int
    is_last: bool

    @property
    def kept(self) -> int:
        """Rows that go on behind the attention."""
        return self.noisy if self.is_last else self.rows

    @property
    def total_kept(self) -> int:
        return self.total_noisy if self.is_last else self.total

    def products_before(self) -> list[Product]:
        dim = self.shape.dim
        if self.is_last:
            return [(self.noisy, dim, dim), (self.rows, 2 * dim, dim)]
        return [(self.rows, 3 * dim, dim)]

    def products_after(self) -> list[Product]:
        dim, ffn = self.shape.dim, self.shape.ffn_dim
        crossed = [(self.noisy, dim, dim)] * 2
        return [(self.kept, dim, dim), *crossed, (self.kept, ffn, dim), (self.kept, dim, ffn)]

    def fused_bytes_before(self) -> float:
        """Norm and rotation of q and k, each read and written."""
        return 2 * BF16_BYTES * (self.kept + self.rows) * self.shape.dim

    def fused_bytes_after(self) -> float:
        """Two gated residuals with norms, and what surrounds the cross-attention."""
        return (8 * self.kept + 6 * self.noisy) * BF16_BYTES * self.shape.dim

    def crossed(self) -> Attention:
        return (self.noisy, self.shape.text_tokens, self.shape.dim // HEAD_DIM)

    def tensor_bytes(self, rows: int) -> float:
        """Of q, k, v or the result, of so many rows and all heads."""
        return BF16_BYTES * rows * self.shape.dim


def layers_of(shape: ModelShape, stage: int, degree: int, params: SamplingParams) -> tuple[Layer, Layer]:
    """A layer but the last, and the last, on the rank that holds most."""
    noisy, history = shape.noisy_tokens(params, stage), shape.history_tokens(params)
    shards = shard(((history, noisy),), degree)
    usual = Layer(
        shape=shape,
        degree=degree,
        rows=shards.max_rows,
        noisy=shards.only(1).max_rows,
        total=history + noisy,
        total_noisy=noisy,
        is_last=False,
    )
    return usual, replace(usual, is_last=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """What was measured on one GPU: a forward of each stage, a chunk's kernels by kind without those of the VAE, and
    the rate of a copy."""

    file: str
    device: str
    commit: str
    num_sms: int
    forward_ms: tuple[float, ...]
    kernel_ms: Mapping[str, float]
    copy_gb_per_s: float


def read_anchor(path: Path) -> Anchor:
    """The numbers of a kept result."""
    result = outcome.read(path)
    assert result.is_green, f"{path.name}: a gate is red"
    found = {one.name: one for one in result.measurements}
    chunk = found["chunk/idle_share/1-1-1"].details["ms_by_kind"]
    decode = found["vae/decode_kernel_ms/bf16"].details["ms_by_kind"]
    return Anchor(
        file=path.name,
        device=str(result.environment["device"]),
        commit=str(result.source.commit),
        num_sms=int(result.environment["multiprocessors"]),
        forward_ms=tuple(found[f"dit/forward_ms/stage{stage}"].samples.median for stage in STAGES),
        kernel_ms={kind: chunk[kind] - decode[kind] for kind in ("gemm", "attention", "fused")},
        copy_gb_per_s=found["micro/copy"].samples.median,
    )
