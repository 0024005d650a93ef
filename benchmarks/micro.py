"""What the device can do at most: copies and matrix products, bf16 and e4m3, at the model's shapes.

Knows shapes and targets; knows no model. The other micro-benchmarks are listed here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import micro_attention, micro_conv, micro_fused
from benchmarks.plan import Bench, Measurement, Section
from benchmarks.timing import num_bytes, num_sets, poison, twice
from helios_serve import kernels

TOKENS = (2940, 4560, 5880, 11040)
_COPY_BYTES = 2 << 30
_SOAK_S = 10.0
_STEADY_S = 1.5
_CALLS = 32  # of a reading: the pause before it does not cool the device


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A linear layer's shape: [outputs, inputs]."""

    name: str
    outputs: int
    inputs: int


def weights(bench: Bench) -> tuple[_Weight, ...]:
    """The four products of a block."""
    config = bench.sizes.transformer
    dim, ffn = config.dim, config.ffn_dim
    return (
        _Weight(name="qkv", outputs=3 * dim, inputs=dim),
        _Weight(name="out", outputs=dim, inputs=dim),
        _Weight(name="ffn_up", outputs=ffn, inputs=dim),
        _Weight(name="ffn_down", outputs=dim, inputs=ffn),
    )


def copy_bandwidth(bench: Bench) -> list[Measurement]:
    """Device to device, bytes read and written; other sections compare with its median."""
    size = _COPY_BYTES if bench.sizes.is_full else 1 << 20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    poison(target)
    taken, spread = twice(
        lambda: bench.clock.measure(lambda _: target.copy_(source), repetitions=bench.sizes.repetitions)
    )
    rate = taken.per_second(2 * size / 1e9)
    bench.cache["copy_gb_per_s"] = rate.median
    return [Measurement(name="micro/copy", unit="GB/s", samples=rate, is_better_high=True, details={"spread": spread})]


def gemm(bench: Bench) -> list[Measurement]:
    """Steady bf16 products with bias, after the device has got warm on the largest."""
    sizes = bench.sizes
    shapes = [(tokens, weight) for weight in weights(bench) for tokens in (TOKENS if sizes.is_full else (8,))]
    _soak(bench, *shapes[-1])
    share_s = min(_STEADY_S, 0.8 * (bench.remaining_s - 2) / len(shapes)) if sizes.is_full else 0.0
    made: list[Measurement] = []
    for kind, duration_s in (("gemm", share_s), ("gemm_gelu", share_s / 2)):
        for tokens, weight in shapes:
            if kind == "gemm" or weight.name == "ffn_up":
                name = f"micro/{kind}/{weight.name}/S{tokens}"
                made += bench.attempt(name, partial(_gemm, bench, tokens, weight, duration_s, name))
    return made


def _soak(bench: Bench, tokens: int, weight: _Weight) -> None:
    run, _ = _linear(bench, tokens, weight, F.linear)
    bench.clock.measure_for(
        run, duration_s=min(_SOAK_S, bench.remaining_s / 3) if bench.sizes.is_full else 0, calls=_CALLS
    )


def _gemm(bench: Bench, tokens: int, weight: _Weight, duration_s: float, name: str) -> Measurement:
    apply = kernels.linear_gelu if "gelu" in name else F.linear
    run, operations = _linear(bench, tokens, weight, apply)
    start = time.monotonic()
    taken, spread = twice(lambda: bench.clock.measure_for(run, duration_s=duration_s / 2, calls=_CALLS))
    return Measurement(
        name=name,
        unit="TFLOP/s",
        samples=taken.per_second(operations / 1e12),
        is_better_high=True,
        details={
            "ms": taken.median,
            "spread": spread,
            "operations": operations,
            "bytes": bench.sizes.dtype.itemsize * _num_values(tokens, weight),
            "clocks": bench.sampler.since(start),
        },
    )


def _num_values(tokens: int, weight: _Weight) -> int:
    """Read or written by a product."""
    return tokens * (weight.inputs + weight.outputs) + weight.inputs * weight.outputs


def _linear(
    bench: Bench, tokens: int, weight: _Weight, apply: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Callable[[int], object], int]:
    """A call with rotating inputs, and its operations."""
    like: dict[str, Any] = {"dtype": bench.sizes.dtype, "device": bench.device}

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        matrix = torch.randn(weight.outputs, weight.inputs, **like).mul_(0.02)
        return torch.randn(tokens, weight.inputs, **like), matrix, torch.randn(weight.outputs, **like)

    sets = [draw()]
    sets += [draw() for _ in range(max(2, num_sets(num_bytes(*sets[0]), limit=8)) - 1)]
    return lambda number: apply(*sets[number % len(sets)]), 2 * tokens * weight.outputs * weight.inputs


def fp8_gemm(bench: Bench) -> list[Measurement]:
    """Row-wise scaled e4m3 products, alone and behind a pass that quantises the activations."""
    tokens = (2940, 4560, 11040) if bench.sizes.is_full else (16,)
    made: list[Measurement] = []
    for weight in weights(bench):
        for count in tokens:
            sets = [_fp8_set(bench, count, weight) for _ in range(3)]
            for kind, run in (("fp8", _product), ("fp8_with_quantisation", _quantised_product)):
                name = f"micro/{kind}/{weight.name}/S{count}"
                made += bench.attempt(name, partial(_fp8, bench, sets, run, name))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fp8Set:
    x: Tensor  # [N, K] bf16
    rows: Tensor
    row_scale: Tensor
    matrix: Tensor
    matrix_scale: Tensor
    bias: Tensor


def _fp8_set(bench: Bench, tokens: int, weight: _Weight) -> _Fp8Set:
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": bench.device}
    x = torch.randn(tokens, weight.inputs, **like)
    rows, row_scale = kernels.quantize_rows(x)
    matrix, matrix_scale = kernels.quantize_rows(torch.randn(weight.outputs, weight.inputs, **like).mul_(0.02))
    bias = torch.randn(weight.outputs, **like)
    return _Fp8Set(x=x, rows=rows, row_scale=row_scale, matrix=matrix, matrix_scale=matrix_scale, bias=bias)


def _product(one: _Fp8Set) -> Tensor:
    return kernels.scaled_linear(one.rows, one.row_scale, one.matrix, one.matrix_scale, one.bias)


def _quantised_product(one: _Fp8Set) -> Tensor:
    rows, row_scale = kernels.quantize_rows(one.x)
    return kernels.scaled_linear(rows, row_scale, one.matrix, one.matrix_scale, one.bias)


def _fp8(bench: Bench, sets: list[_Fp8Set], run: Callable[[_Fp8Set], Tensor], name: str) -> Measurement:
    repetitions = bench.sizes.repetitions
    taken, spread = twice(
        lambda: bench.clock.measure(lambda number: run(sets[number % len(sets)]), repetitions=repetitions, calls=8)
    )
    one = sets[0]
    operations = 2 * one.x.numel() * len(one.matrix)
    return Measurement(
        name=name,
        unit="TFLOP/s",
        samples=taken.per_second(operations / 1e12),
        is_better_high=True,
        details={"ms": taken.median, "spread": spread},
    )


SECTIONS: tuple[Section, ...] = (
    Section(name="micro/copy", value_rank=1, expected_s=2, run=copy_bandwidth),
    *micro_conv.SECTIONS,
    *micro_attention.SECTIONS,
    *micro_fused.SECTIONS,
    Section(name="micro/gemm", value_rank=30, expected_s=45, run=gemm),
    Section(name="micro/fp8", value_rank=31, expected_s=8, run=fp8_gemm),
)
