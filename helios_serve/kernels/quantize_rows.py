"""Rounding of rows to e4m3 with one scale per row, alone and behind GELU.

One program per row, which it reads once; what GELU gives is rounded once, to e4m3. Knows rows and their largest
entries; knows no matrix product. e4m3 needs compute capability 8.9.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helios_serve.kernels import reference_fp8
from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.fp8 import quantize_rows as reference_quantize_rows
from helios_serve.kernels.launch import Specialisation, accumulator, default_plan, jit, operator, row_plan, tl
from helios_serve.kernels.row_parts import load_row, store_quantized_row

_SLOPE = -2.0 * (2.0 / math.pi) ** 0.5 * math.log2(math.e)
_LINEAR, _CUBIC = (tl and tl.constexpr(factor * _SLOPE) for factor in (1.0, 0.044715))
"""0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 u)): the polynomial of the exponent, in powers of two."""


@jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    row_scale_ptr,
    x_stride,
    D: tl.constexpr,
    IS_GELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    parts = load_row(x_ptr + token * x_stride, D, WIDE, BLOCK)
    if IS_GELU:
        activated = ()
        for start in tl.static_range(0, D, BLOCK):
            part = parts[start // BLOCK]
            inner = part * tl.fma(part * part, _CUBIC, _LINEAR)
            root = tl.rsqrt(1.0 + tl.exp2(inner))  # its square takes fewer instructions than a division
            activated += (part * (root * root),)
        parts = activated
    store_quantized_row(parts, out_ptr + token * D, row_scale_ptr + token, D, BLOCK)


def launch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` by Triton; rows may be apart."""
    return _launch(x, is_gelu=False)


def launch_gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference_fp8.gelu_quantize_rows` by Triton; rows may be apart."""
    return _launch(x, is_gelu=True)


def _launch(x: Tensor, *, is_gelu: bool) -> tuple[Tensor, Tensor]:
    assert x.stride(1) == 1
    out, row_scale = empty_rows(x)
    plan = row_plan(_quantize_rows_kernel, x.shape[1], x.device)
    _quantize_rows_kernel[(len(x),)](
        x,
        out,
        row_scale,
        x.stride(0),
        D=x.shape[1],
        IS_GELU=is_gelu,
        WIDE=accumulator(x),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    return out, row_scale


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows of the shape of `x` [N, D] go: [N, D] e4m3 and their scales [N, 1] float32."""
    return torch.empty(x.shape, dtype=FP8, device=x.device), x.new_empty((len(x), 1), dtype=torch.float32)


quantize_rows = operator(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)",
    reference=reference_quantize_rows,
    kernel=launch_quantize_rows,
    shapes=empty_rows,
)


gelu_quantize_rows = operator(
    "gelu_quantize_rows(Tensor x) -> (Tensor, Tensor)",
    reference=reference_fp8.gelu_quantize_rows,
    kernel=launch_gelu_quantize_rows,
    shapes=empty_rows,
)


def specialisations(width: int, ffn_width: int) -> tuple[Specialisation, ...]:
    """What FP8 linear layers with those numbers of inputs launch in bfloat16; GELU stands before the wider one."""
    names = {"quantize_rows": (width, False), "gelu_quantize_rows": (ffn_width, True)}
    return tuple(
        Specialisation(
            name=name,
            kernel=_quantize_rows_kernel,
            types={"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "x_stride": "i32"},
            constants={"D": inner, "IS_GELU": is_gelu, "WIDE": tl.float32, "BLOCK": default_plan(inner).block},
            num_warps=default_plan(inner).num_warps,
            is_contracted=False,
            min_capability=90,
        )
        for name, (inner, is_gelu) in names.items()
    )
