"""LayerNorm with modulation by row index, alone and fused with the residual that precedes it.

One program per token: it reads its row once, keeps it in registers and writes each result once. The tables, which are
larger than the rows and the same for most tokens, stay in the first-level cache. Statistics are float32
(float64 for float64 inputs). The products and sums of a residual are rounded one by one, as in the reference: nothing
is contracted to a fused multiply-add but what the norm says is. A result is rounded to the dtype of `x`, or at once to
e4m3 with a scale per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.launch import Specialisation, accumulator, default_plan, jit, operator, row_plan, tl
from helios_serve.kernels.row_parts import (
    load_part,
    load_row,
    normed_row,
    scaled_row,
    store_quantized_row,
    store_row,
)

_EXACT = {"enable_fp_fusion": False}


@jit
def _layer_norm_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    row_ptr,
    out_ptr,
    row_scale_ptr,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    IS_MODULATED: tl.constexpr,
    IS_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + token).to(tl.int64) if IS_MODULATED else 0
    parts = normed_row(load_row(x_ptr + token * D, D, WIDE, BLOCK), D, EPS, BLOCK)
    scale_ptr, shift_ptr = scale_ptr + row * scale_stride, shift_ptr + row * shift_stride
    parts = scaled_row(parts, scale_ptr, shift_ptr, IS_MODULATED, D, WIDE, BLOCK)
    if IS_FP8:
        store_quantized_row(parts, out_ptr + token * D, row_scale_ptr + token, D, BLOCK)
    else:
        store_row(parts, out_ptr + token * D, D, BLOCK)


@jit
def _gated_residual_norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    row_ptr,
    place_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    normed_scale_ptr,
    current_ptr,
    current_scale_ptr,
    gate_stride,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.load(row_ptr + token).to(tl.int64)
    x, y = load_row(x_ptr + token * D, D, WIDE, BLOCK), load_row(y_ptr + token * D, D, WIDE, BLOCK)
    added = ()
    for start in tl.static_range(0, D, BLOCK):
        gate = load_part(gate_ptr + row * gate_stride, start, D, WIDE, BLOCK)
        added += ((x[start // BLOCK] + y[start // BLOCK] * gate).to(dtype).to(WIDE),)
    store_row(added, x_ptr + token * D, D, BLOCK)
    normed = normed_row(added, D, EPS, BLOCK)
    place = -1
    if IS_SPLIT:
        place = tl.load(place_ptr + token).to(tl.int64)
        if place >= 0:
            parts = scaled_row(normed, weight_ptr, bias_ptr, False, D, WIDE, BLOCK)
            if IS_FP8:
                store_quantized_row(parts, current_ptr + place * D, current_scale_ptr + place, D, BLOCK)
            else:
                store_row(parts, current_ptr + place * D, D, BLOCK)
    if place < 0:
        scale_ptr, shift_ptr = scale_ptr + row * scale_stride, shift_ptr + row * shift_stride
        parts = scaled_row(normed, scale_ptr, shift_ptr, True, D, WIDE, BLOCK)
        if IS_FP8:
            store_quantized_row(parts, normed_ptr + token * D, normed_scale_ptr + token, D, BLOCK)
        else:
            store_row(parts, normed_ptr + token * D, D, BLOCK)


@jit
def _residual_scatter_norm_kernel(
    x_ptr,
    y_ptr,
    index_ptr,
    shift_ptr,
    scale_ptr,
    row_ptr,
    normed_ptr,
    normed_scale_ptr,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    IS_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.load(index_ptr + place).to(tl.int64)
    y = load_row(y_ptr + place * D, D, WIDE, BLOCK)  # is on its way while the index is
    x = load_row(x_ptr + token * D, D, WIDE, BLOCK)
    row = tl.load(row_ptr + token).to(tl.int64)
    added = ()
    for start in tl.static_range(0, D, BLOCK):
        added += ((x[start // BLOCK] + y[start // BLOCK]).to(dtype).to(WIDE),)
    store_row(added, x_ptr + token * D, D, BLOCK)
    scale_ptr, shift_ptr = scale_ptr + row * scale_stride, shift_ptr + row * shift_stride
    parts = scaled_row(normed_row(added, D, EPS, BLOCK), scale_ptr, shift_ptr, True, D, WIDE, BLOCK)
    if IS_FP8:
        store_quantized_row(parts, normed_ptr + token * D, normed_scale_ptr + token, D, BLOCK)
    else:
        store_row(parts, normed_ptr + token * D, D, BLOCK)


def launch_layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm_modulate` by Triton; shift and scale may be rows of a larger table."""
    out = torch.empty_like(x)
    launch_norm(x, shift, scale, row, eps, out, None)
    return out


def launch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm` by Triton."""
    out = torch.empty_like(x)
    launch_norm(x, bias, weight, None, eps, out, None)
    return out


def launch_norm(
    x: Tensor, shift: Tensor, scale: Tensor, row: Tensor | None, eps: float, out: Tensor, row_scale: Tensor | None
) -> None:
    """Both norms; with `row_scale` [N, 1] float32 the result `out` [N, D] is e4m3."""
    _check_rows(x, out)
    _check_tables(shift, scale)
    plan = row_plan(_layer_norm_kernel, x.shape[1], x.device)
    _layer_norm_kernel[(len(x),)](
        x,
        shift,
        scale,
        row,
        out,
        row_scale,
        shift.stride(0),
        scale.stride(0),
        D=x.shape[1],
        EPS=eps,
        IS_MODULATED=row is not None,
        IS_FP8=row_scale is not None,
        WIDE=accumulator(x),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        **_EXACT,
    )


def launch_gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, row: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """`reference.gated_residual_norm` by Triton."""
    normed = torch.empty_like(x)
    launch_residual(x, y, gate, row, None, shift, scale, None, None, eps, normed, None, None, None)
    return normed


def launch_gated_residual_split_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    row: Tensor,
    current_place: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed: Tensor,
    current: Tensor,
) -> None:
    """`reference.gated_residual_split_norm` by Triton."""
    launch_residual(x, y, gate, row, current_place, shift, scale, weight, bias, eps, normed, None, current, None)


def launch_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    row: Tensor,
    current_place: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    normed: Tensor,
    normed_scale: Tensor | None,
    current: Tensor | None,
    current_scale: Tensor | None,
) -> None:
    """All residuals with a gate; with scales [., 1] float32 the results are e4m3."""
    _check_rows(x, y, normed, *(() if current is None else (current,)))
    _check_tables(gate, shift, scale)
    plan = row_plan(_gated_residual_norm_kernel, x.shape[1], x.device)
    _gated_residual_norm_kernel[(len(x),)](
        x,
        y,
        gate,
        row,
        current_place,
        shift,
        scale,
        weight,
        bias,
        normed,
        normed_scale,
        current,
        current_scale,
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        D=x.shape[1],
        EPS=eps,
        IS_SPLIT=current_place is not None,
        IS_FP8=normed_scale is not None,
        WIDE=accumulator(x),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        **_EXACT,
    )


def launch_residual_scatter_norm(
    x: Tensor, y: Tensor, index: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float, normed: Tensor
) -> None:
    """`reference.residual_scatter_norm` by Triton."""
    launch_scatter(x, y, index, shift, scale, row, eps, normed, None)


def launch_scatter(
    x: Tensor,
    y: Tensor,
    index: Tensor,
    shift: Tensor,
    scale: Tensor,
    row: Tensor,
    eps: float,
    normed: Tensor,
    normed_scale: Tensor | None,
) -> None:
    """The same; with `normed_scale` [N, 1] float32 the result is e4m3."""
    _check_rows(x, y, normed)
    _check_tables(shift, scale)
    plan = row_plan(_residual_scatter_norm_kernel, x.shape[1], x.device)
    _residual_scatter_norm_kernel[(len(y),)](
        x,
        y,
        index,
        shift,
        scale,
        row,
        normed,
        normed_scale,
        shift.stride(0),
        scale.stride(0),
        D=x.shape[1],
        EPS=eps,
        IS_FP8=normed_scale is not None,
        WIDE=accumulator(x),
        BLOCK=plan.block,
        num_warps=plan.num_warps,
        **_EXACT,
    )


def _check_rows(*tensors: Tensor) -> None:
    """Those of activations lie back to back."""
    assert all(tensor.is_contiguous() for tensor in tensors)


def _check_tables(*tables: Tensor) -> None:
    """Kernels walk along their rows, which may be apart."""
    assert all(table.stride(-1) == 1 for table in tables)


layer_norm_modulate = operator(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor row, float eps) -> Tensor",
    reference=reference.layer_norm_modulate,
    kernel=launch_layer_norm_modulate,
    shapes=lambda x, *_: torch.empty_like(x),
)
layer_norm = operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference.layer_norm,
    kernel=launch_layer_norm,
    shapes=lambda x, *_: torch.empty_like(x),
)
gated_residual_norm = operator(
    "gated_residual_norm(Tensor(a!) x, Tensor y, Tensor gate, Tensor row, Tensor shift, Tensor scale, float eps) "
    "-> Tensor",
    reference=reference.gated_residual_norm,
    kernel=launch_gated_residual_norm,
    shapes=lambda x, *_: torch.empty_like(x),
)
gated_residual_split_norm = operator(
    "gated_residual_split_norm(Tensor(a!) x, Tensor y, Tensor gate, Tensor row, Tensor current_place, Tensor shift, "
    "Tensor scale, Tensor weight, Tensor bias, float eps, Tensor(b!) normed, Tensor(c!) current) -> ()",
    reference=reference.gated_residual_split_norm,
    kernel=launch_gated_residual_split_norm,
    shapes=lambda *_: None,
)
residual_scatter_norm = operator(
    "residual_scatter_norm(Tensor(a!) x, Tensor y, Tensor index, Tensor shift, Tensor scale, Tensor row, float eps, "
    "Tensor(b!) normed) -> ()",
    reference=reference.residual_scatter_norm,
    kernel=launch_residual_scatter_norm,
    shapes=lambda *_: None,
)


def specialisations(width: int) -> tuple[Specialisation, ...]:
    """What a transformer of that width launches in bfloat16, with results in bfloat16 and in e4m3."""
    return (*_specialisations(width, is_fp8=False), *_specialisations(width, is_fp8=True))


def _specialisations(width: int, *, is_fp8: bool) -> tuple[Specialisation, ...]:
    plan = default_plan(width)
    always = {"D": width, "EPS": 1e-6, "WIDE": tl.float32, "BLOCK": plan.block, "IS_FP8": is_fp8}
    result = "*fp8e4nv" if is_fp8 else "*bf16"
    tables = {"shift_ptr": "*fp32", "scale_ptr": "*fp32", "shift_stride": "i32", "scale_stride": "i32"}
    norm = {"x_ptr": "*bf16", "out_ptr": result, "row_scale_ptr": "*fp32", **tables}
    stream = {"x_ptr": "*bf16", "y_ptr": "*bf16", "row_ptr": "*i32", **tables}
    stream |= {"normed_ptr": result, "normed_scale_ptr": "*fp32"}
    gated = {**stream, "gate_ptr": "*fp32", "gate_stride": "i32"}
    whole = dict.fromkeys(("place_ptr", "weight_ptr", "bias_ptr", "current_ptr", "current_scale_ptr"))
    split = {"place_ptr": "*i32", "weight_ptr": "*fp32", "bias_ptr": "*fp32"}
    split |= {"current_ptr": result, "current_scale_ptr": "*fp32"}
    made: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("layer_norm_modulate", _layer_norm_kernel, {**norm, "row_ptr": "*i32"}, {"IS_MODULATED": True}),
        ("gated_residual_norm", _gated_residual_norm_kernel, gated, {"IS_SPLIT": False, **whole}),
        ("gated_residual_split_norm", _gated_residual_norm_kernel, {**gated, **split}, {"IS_SPLIT": True}),
        ("residual_scatter_norm", _residual_scatter_norm_kernel, {**stream, "index_ptr": "*i64"}, {}),
    ]
    if not is_fp8:
        made.append(("layer_norm", _layer_norm_kernel, norm, {"IS_MODULATED": False, "row_ptr": None}))
    absent = {} if is_fp8 else dict.fromkeys(("row_scale_ptr", "normed_scale_ptr", "current_scale_ptr"))
    return tuple(
        Specialisation(
            name=f"{name}_fp8" if is_fp8 else name,
            kernel=kernel,
            types={argument: kind for argument, kind in types.items() if argument not in absent},
            constants={**always, **constants, **{key: None for key in absent if key in kernel.arg_names}},
            num_warps=plan.num_warps,
            is_contracted=False,
            min_capability=90 if is_fp8 else 80,
        )
        for name, kernel, types, constants in made
    )
