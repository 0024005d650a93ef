"""Rounding of rows to e4m3 with one scale per row, alone and at the end of another kernel.

One program per row, which it reads once. Knows rows and their largest entries; knows no matrix product. e4m3 needs
compute capability 8.9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.fp8 import quantize_rows as reference_quantize_rows
from helios_serve.kernels.launch import Specialisation, block_of, jit, num_warps, operator, tl, warps_for


@jit
def store_row(
    value,
    x_ptr,
    out_ptr,
    row_scale_ptr,
    place,
    columns,
    is_inside,
    D: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """Writes row `place` [D] in the dtype of `x_ptr`, or that in e4m3 with its scale."""
    rounded = value.to(x_ptr.dtype.element_ty)
    if IS_FP8:
        wide = tl.where(is_inside, rounded.to(tl.float32), 0.0)
        row_scale = tl.div_rn(tl.max(tl.abs(wide), 0), 448.0)
        row_scale = tl.where(row_scale == 0.0, 1.0, row_scale)
        tl.store(row_scale_ptr + place, row_scale)
        wide = tl.clamp(tl.div_rn(wide, row_scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + place * D + columns, wide.to(tl.float8e4nv), mask=is_inside)
    else:
        tl.store(out_ptr + place * D + columns, rounded, mask=is_inside)


@jit
def _quantize_rows_kernel(x_ptr, out_ptr, row_scale_ptr, x_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    value = tl.load(x_ptr + token * x_stride + columns, mask=is_inside, other=0.0)
    store_row(value, x_ptr, out_ptr, row_scale_ptr, token, columns, is_inside, D, True)


def launch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` by Triton; rows may be apart."""
    assert x.stride(1) == 1
    (out, row_scale), block = empty_rows(x), block_of(x.shape[1])
    _quantize_rows_kernel[(len(x),)](
        x,
        out,
        row_scale,
        x.stride(0),
        D=x.shape[1],
        BLOCK=block,
        num_warps=num_warps(_quantize_rows_kernel, block, x.device),
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


def specialisations(widths: tuple[int, ...]) -> tuple[Specialisation, ...]:
    """What FP8 linear layers with those numbers of inputs launch in bfloat16."""
    return tuple(
        Specialisation(
            name=f"quantize_rows_{width}",
            kernel=_quantize_rows_kernel,
            types={"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "x_stride": "i32"},
            constants={"D": width, "BLOCK": block_of(width)},
            num_warps=warps_for(block_of(width)),
            is_contracted=False,
            min_capability=90,
        )
        for width in widths
    )
