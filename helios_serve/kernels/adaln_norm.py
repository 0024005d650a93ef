"""LayerNorm with modulation by row index, alone and fused with the residual that precedes it.

One program per token: it reads its row once, keeps it in registers and writes each result once. Statistics are float32
(float64 for float64 inputs). Products and sums are rounded one by one, as in the reference: nothing is contracted to a
fused multiply-add.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.launch import Specialisation, accumulator, block_of, jit, operator, tl, warps_for

_EXACT = {"enable_fp_fusion": False}


@jit
def _normed(value, is_inside, D: tl.constexpr, EPS: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of a row in registers."""
    mean = tl.sum(value, 0) / D
    centred = tl.where(is_inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / D
    return centred * (1.0 / tl.sqrt(variance + EPS))


@jit
def _layer_norm_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    row_ptr,
    out_ptr,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    IS_MODULATED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    value = tl.load(x_ptr + token * D + columns, mask=is_inside, other=0.0).to(WIDE)
    row = tl.load(row_ptr + token).to(tl.int64) if IS_MODULATED else 0
    shift = tl.load(shift_ptr + row * shift_stride + columns, mask=is_inside, other=0.0).to(WIDE)
    scale = tl.load(scale_ptr + row * scale_stride + columns, mask=is_inside, other=0.0).to(WIDE)
    if IS_MODULATED:
        scale = 1.0 + scale
    out = _normed(value, is_inside, D, EPS) * scale + shift
    tl.store(out_ptr + token * D + columns, out.to(out_ptr.dtype.element_ty), mask=is_inside)


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
    current_ptr,
    gate_stride,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    row = tl.load(row_ptr + token).to(tl.int64)
    x = tl.load(x_ptr + token * D + columns, mask=is_inside, other=0.0).to(WIDE)
    y = tl.load(y_ptr + token * D + columns, mask=is_inside, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=is_inside, other=0.0).to(WIDE)
    added = (x + y * gate).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + token * D + columns, added, mask=is_inside)
    normed = _normed(added.to(WIDE), is_inside, D, EPS)
    place = -1
    if IS_SPLIT:
        place = tl.load(place_ptr + token).to(tl.int64)
        if place >= 0:
            weight = tl.load(weight_ptr + columns, mask=is_inside, other=0.0).to(WIDE)
            bias = tl.load(bias_ptr + columns, mask=is_inside, other=0.0).to(WIDE)
            out = normed * weight + bias
            tl.store(current_ptr + place * D + columns, out.to(current_ptr.dtype.element_ty), mask=is_inside)
    if place < 0:
        shift = tl.load(shift_ptr + row * shift_stride + columns, mask=is_inside, other=0.0).to(WIDE)
        scale = tl.load(scale_ptr + row * scale_stride + columns, mask=is_inside, other=0.0).to(WIDE)
        out = normed * (1.0 + scale) + shift
        tl.store(normed_ptr + token * D + columns, out.to(normed_ptr.dtype.element_ty), mask=is_inside)


@jit
def _residual_scatter_norm_kernel(
    x_ptr,
    y_ptr,
    index_ptr,
    shift_ptr,
    scale_ptr,
    row_ptr,
    normed_ptr,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(index_ptr + place).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    row = tl.load(row_ptr + token).to(tl.int64)
    x = tl.load(x_ptr + token * D + columns, mask=is_inside, other=0.0).to(WIDE)
    y = tl.load(y_ptr + place * D + columns, mask=is_inside, other=0.0).to(WIDE)
    added = (x + y).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + token * D + columns, added, mask=is_inside)
    shift = tl.load(shift_ptr + row * shift_stride + columns, mask=is_inside, other=0.0).to(WIDE)
    scale = tl.load(scale_ptr + row * scale_stride + columns, mask=is_inside, other=0.0).to(WIDE)
    out = _normed(added.to(WIDE), is_inside, D, EPS) * (1.0 + scale) + shift
    tl.store(normed_ptr + token * D + columns, out.to(normed_ptr.dtype.element_ty), mask=is_inside)


def launch_layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm_modulate` by Triton; shift and scale may be rows of a larger table."""
    return _launch_norm(x, shift, scale, row, eps)


def launch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm` by Triton."""
    return _launch_norm(x, bias, weight, None, eps)


def _launch_norm(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor | None, eps: float) -> Tensor:
    _check_rows(x, shift, scale)
    out, block = torch.empty_like(x), block_of(x.shape[1])
    _layer_norm_kernel[(len(x),)](
        x,
        shift,
        scale,
        row,
        out,
        shift.stride(0),
        scale.stride(0),
        D=x.shape[1],
        EPS=eps,
        IS_MODULATED=row is not None,
        WIDE=accumulator(x),
        BLOCK=block,
        num_warps=warps_for(block),
        **_EXACT,
    )
    return out


def launch_gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, row: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """`reference.gated_residual_norm` by Triton."""
    normed = torch.empty_like(x)
    _launch_residual(x, y, gate, row, None, shift, scale, None, None, eps, normed, None)
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
    _check_rows(normed, current, weight, bias)
    _launch_residual(x, y, gate, row, current_place, shift, scale, weight, bias, eps, normed, current)


def _launch_residual(
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
    current: Tensor | None,
) -> None:
    _check_rows(x, y, gate, shift, scale)
    block = block_of(x.shape[1])
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
        current,
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        D=x.shape[1],
        EPS=eps,
        IS_SPLIT=current_place is not None,
        WIDE=accumulator(x),
        BLOCK=block,
        num_warps=warps_for(block),
        **_EXACT,
    )


def launch_residual_scatter_norm(
    x: Tensor, y: Tensor, index: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float, normed: Tensor
) -> None:
    """`reference.residual_scatter_norm` by Triton."""
    _check_rows(x, y, shift, scale, normed)
    block = block_of(x.shape[1])
    _residual_scatter_norm_kernel[(len(y),)](
        x,
        y,
        index,
        shift,
        scale,
        row,
        normed,
        shift.stride(0),
        scale.stride(0),
        D=x.shape[1],
        EPS=eps,
        WIDE=accumulator(x),
        BLOCK=block,
        num_warps=warps_for(block),
        **_EXACT,
    )


def _check_rows(*tensors: Tensor) -> None:
    """Kernels walk along rows; those of activations lie back to back."""
    assert all(tensor.stride(-1) == 1 for tensor in tensors)
    assert tensors[0].is_contiguous()


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
    """What a transformer of that width launches in bfloat16."""
    block = block_of(width)
    always = {"D": width, "EPS": 1e-6, "WIDE": tl.float32, "BLOCK": block}
    tables = {"shift_ptr": "*fp32", "scale_ptr": "*fp32", "shift_stride": "i32", "scale_stride": "i32"}
    stream = {"x_ptr": "*bf16", "y_ptr": "*bf16", "row_ptr": "*i32", "normed_ptr": "*bf16", **tables}
    gated = {**stream, "gate_ptr": "*fp32", "gate_stride": "i32"}
    nothing = dict.fromkeys(("place_ptr", "weight_ptr", "bias_ptr", "current_ptr"))
    split = {"place_ptr": "*i32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "current_ptr": "*bf16"}
    norm = {"x_ptr": "*bf16", "out_ptr": "*bf16", **tables}
    made: tuple[tuple[str, Any, dict[str, str], dict[str, Any]], ...] = (
        ("layer_norm_modulate", _layer_norm_kernel, {**norm, "row_ptr": "*i32"}, {"IS_MODULATED": True}),
        ("layer_norm", _layer_norm_kernel, norm, {"IS_MODULATED": False, "row_ptr": None}),
        ("gated_residual_norm", _gated_residual_norm_kernel, gated, {"IS_SPLIT": False, **nothing}),
        ("gated_residual_split_norm", _gated_residual_norm_kernel, {**gated, **split}, {"IS_SPLIT": True}),
        ("residual_scatter_norm", _residual_scatter_norm_kernel, {**stream, "index_ptr": "*i64"}, {}),
    )
    return tuple(
        Specialisation(
            name=name,
            kernel=kernel,
            types=types,
            constants={**always, **constants},
            num_warps=warps_for(block),
            is_contracted=False,
        )
        for name, kernel, types, constants in made
    )
