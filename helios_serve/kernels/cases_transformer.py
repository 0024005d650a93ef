"""The transformer's operators as a list: what tests compare and benchmarks time.

Knows how to make inputs of a shape; measures and compares nothing. Shapes of norms are (history tokens, current
tokens, width), those of rotations (tokens, heads, head size, scales of the history).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels import adaln_norm, adaln_norm_fp8, gelu, reference, reference_fp8
from helios_serve.kernels.attention.quantize_heads import launch_quantize_heads, quantize_heads
from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.op_case import OpCase, Shape, draw, poisoned, unwritten
from helios_serve.kernels.qk_norm_rope import (
    launch_norm_rope,
    launch_qk_norm_rope,
    launch_rms_norm,
    norm_rope,
    qk_norm_rope_,
    reference_qk_norm_rope_,
    rms_norm,
)
from helios_serve.kernels.quantize_rows import (
    gelu_quantize_rows,
    launch_gelu_quantize_rows,
    launch_quantize_rows,
    quantize_rows,
)

EPS = 1e-6
NUM_ROWS = 3  # of the modulation: the history's and two requests'
SPARE = 2  # rows of `current` that nobody writes

_ODD_NORMS = ((0, 1, 40), (27, 40, 96), (5, 8, 130))
_FEW_NORMS = ((0, 1, 5120), (27, 40, 5120))
_SERVED_NORMS = ((2400, 540, 5120), (2400, 2160, 5120), (2400, 8640, 5120))
_ODD_ROTATIONS = ((1, 1, 12, 0), (67, 5, 8, 5), (13, 40, 8, 1))
_FEW_ROTATIONS = ((1, 40, 128, 40), (67, 40, 128, 40))
_SERVED_ROTATIONS = tuple((tokens, 40, 128, scales) for tokens in (2940, 4560, 11040) for scales in (0, 40))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """x, y [N, D]; tables [R, D] as views of one [R, 6, D]; which row and which place a token has."""

    x: Tensor
    y: Tensor
    gate: Tensor
    shift: Tensor
    scale: Tensor
    row: Tensor
    place: Tensor
    current_index: Tensor


def _tokens(shape: Shape, dtype: torch.dtype) -> _Tokens:
    num_history, num_current, width = shape
    count = num_history + num_current
    index = torch.arange(count)
    row = torch.where(index < num_history, 0, 1 + index % (NUM_ROWS - 1))[torch.randperm(count)].int()
    current_index = (row > 0).nonzero()[:, 0]
    place = torch.full((count,), -1, dtype=torch.int32)
    place[current_index] = torch.arange(num_current, dtype=torch.int32)
    table = poisoned(torch.full((NUM_ROWS, 6, width), torch.nan))
    exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    table[:, 1:4] = draw((NUM_ROWS, 3, width), exact).float()
    _, gate, shift, scale, *_ = table.unbind(1)
    return _Tokens(
        x=draw((count, width), dtype),
        y=draw((count, width), dtype),
        gate=gate,
        shift=shift,
        scale=scale,
        row=poisoned(row),
        place=poisoned(place),
        current_index=poisoned(current_index),
    )


def _affine(width: int) -> tuple[Tensor, Tensor]:
    return poisoned(torch.randn(width)), poisoned(torch.randn(width))


def _modulated(shape: Shape, dtype: torch.dtype) -> list[Any]:
    made = _tokens(shape, dtype)
    return [made.x, made.shift, made.scale, made.row, EPS]


def _plain(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [_tokens(shape, dtype).x, *_affine(shape[-1]), EPS]


def _gated(shape: Shape, dtype: torch.dtype) -> list[Any]:
    made = _tokens(shape, dtype)
    return [made.x, made.y, made.gate, made.row, made.shift, made.scale, EPS]


def _split(shape: Shape, dtype: torch.dtype) -> list[Any]:
    made, (_, num_current, width) = _tokens(shape, dtype), shape
    tables = [made.shift, made.scale, *_affine(width)]
    results = [unwritten(tuple(made.x.shape), dtype), unwritten((num_current + SPARE, width), dtype)]
    return [made.x, made.y, made.gate, made.row, made.place, *tables, EPS, *results]


def _scattered(shape: Shape, dtype: torch.dtype) -> list[Any]:
    made, (_, num_current, width) = _tokens(shape, dtype), shape
    index = [made.current_index, made.shift, made.scale, made.row]
    return [made.x, draw((num_current, width), dtype), *index, EPS, unwritten(tuple(made.x.shape), dtype)]


def _with_fp8_results(inputs: Callable[..., list[Any]], written: tuple[int, ...]) -> Callable[..., list[Any]]:
    """The same arguments, but results are e4m3 and followed by their scales."""

    def make(shape: Shape, dtype: torch.dtype) -> list[Any]:
        arguments: list[Any] = []
        for index, argument in enumerate(inputs(shape, dtype)):
            is_result = index in written
            arguments.append(unwritten(tuple(argument.shape), FP8) if is_result else argument)
            arguments.extend([unwritten((len(argument), 1), torch.float32)] if is_result else [])
        return arguments

    return make


def _rows(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """Few quotients lie in the middle of two e4m3 numbers."""
    return [poisoned(torch.randn(shape).to(dtype))]


def _rotated(shape: Shape, dtype: torch.dtype, *, num_tensors: int) -> list[Any]:
    """Rotary rows are no unit vectors, as averages are not."""
    count, heads, dim, num_scales = shape
    shapes = (count, num_tensors, heads, dim) if num_tensors > 1 else (count, heads, dim)
    weights = [poisoned(torch.randn(heads * dim).to(dtype)) for _ in range(min(2, num_tensors))]
    scale = poisoned(1 + torch.rand(num_scales)) if num_scales else None
    row = poisoned((torch.arange(count) % NUM_ROWS)[torch.randperm(count)].int())
    return [draw(shapes, dtype), *weights, poisoned(torch.randn(count, 2, dim // 2)), EPS, scale, row]


def _fused_projection(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return _rotated(shape, dtype, num_tensors=3)


def _one_projection(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return _rotated(shape, dtype, num_tensors=1)


def _weighted(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [draw(shape, dtype), poisoned(torch.randn(shape[1]).to(dtype)), EPS]


def _linear(shape: Shape, dtype: torch.dtype) -> list[Any]:
    rows, inner, outer = shape
    weight = poisoned((torch.randn(outer, inner) / inner**0.5).to(dtype))
    return [draw((rows, inner), dtype), weight, poisoned(torch.randn(outer).to(dtype))]


def _packed_heads(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """Queries as the fused projection leaves them: parts of wider rows, whose remainder is NaN. Heads differ in size,
    and so do sequences. No entry is subnormal in e4m3: the interpreter rounds those in its own way."""
    heads, head_dim, *lengths = shape
    cu = [0, *accumulate(lengths)]
    wider = unwritten((cu[-1], 3, heads, head_dim), dtype)
    drawn = torch.randn(cu[-1], heads, head_dim)
    wider[:, 1] = ((drawn + drawn.sign() / 16) * (1 + torch.arange(heads))[:, None]).to(dtype)
    for sequence, (start, stop) in enumerate(pairwise(cu)):
        wider[start:stop, 1] *= 2.0**sequence
    return [wider[:, 1], cu]


CASES = (
    OpCase(
        name="layer_norm_modulate",
        operator=adaln_norm.layer_norm_modulate,
        launch=adaln_norm.launch_layer_norm_modulate,
        reference=reference.layer_norm_modulate,
        inputs=_modulated,
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="layer_norm",
        operator=adaln_norm.layer_norm,
        launch=adaln_norm.launch_layer_norm,
        reference=reference.layer_norm,
        inputs=_plain,
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="gated_residual_norm",
        operator=adaln_norm.gated_residual_norm,
        launch=adaln_norm.launch_gated_residual_norm,
        reference=reference.gated_residual_norm,
        inputs=_gated,
        written=(0,),
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="gated_residual_split_norm",
        operator=adaln_norm.gated_residual_split_norm,
        launch=adaln_norm.launch_gated_residual_split_norm,
        reference=reference.gated_residual_split_norm,
        inputs=_split,
        written=(0, 10, 11),
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="residual_scatter_norm",
        operator=adaln_norm.residual_scatter_norm,
        launch=adaln_norm.launch_residual_scatter_norm,
        reference=reference.residual_scatter_norm,
        inputs=_scattered,
        written=(0, 7),
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="layer_norm_modulate_fp8",
        operator=adaln_norm_fp8.layer_norm_modulate_fp8,
        launch=adaln_norm_fp8.launch_layer_norm_modulate_fp8,
        reference=reference_fp8.layer_norm_modulate_fp8,
        inputs=_modulated,
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="gated_residual_norm_fp8",
        operator=adaln_norm_fp8.gated_residual_norm_fp8,
        launch=adaln_norm_fp8.launch_gated_residual_norm_fp8,
        reference=reference_fp8.gated_residual_norm_fp8,
        inputs=_gated,
        written=(0,),
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="gated_residual_split_norm_fp8",
        operator=adaln_norm_fp8.gated_residual_split_norm_fp8,
        launch=adaln_norm.launch_residual,
        reference=reference_fp8.gated_residual_split_norm_fp8,
        inputs=_with_fp8_results(_split, (10, 11)),
        written=(0, 10, 11, 12, 13),
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="residual_scatter_norm_fp8",
        operator=adaln_norm_fp8.residual_scatter_norm_fp8,
        launch=adaln_norm.launch_scatter,
        reference=reference_fp8.residual_scatter_norm_fp8,
        inputs=_with_fp8_results(_scattered, (7,)),
        written=(0, 7, 8),
        odd=_ODD_NORMS,
        few=_FEW_NORMS,
        served=_SERVED_NORMS,
    ),
    OpCase(
        name="quantize_rows",
        operator=quantize_rows,
        launch=launch_quantize_rows,
        reference=reference.quantize_rows,
        inputs=_rows,
        is_exact=True,
        odd=((1, 40), (67, 96), (13, 130)),
        few=((1, 5120), (67, 13824)),
        served=((2940, 5120), (4560, 5120), (11040, 5120)),
    ),
    OpCase(
        name="gelu_quantize_rows",
        operator=gelu_quantize_rows,
        launch=launch_gelu_quantize_rows,
        reference=reference_fp8.gelu_quantize_rows,
        inputs=_rows,
        odd=((1, 40), (67, 96), (13, 130)),
        few=((1, 13824), (67, 13824)),
        served=((2940, 13824), (4560, 13824), (11040, 13824)),
    ),
    OpCase(
        name="quantize_heads",
        operator=quantize_heads,
        launch=launch_quantize_heads,
        reference=reference_fp8.quantize_heads,
        inputs=_packed_heads,
        is_exact=True,
        odd=((1, 12, 1), (3, 40, 67, 130), (5, 24, 13, 0, 64, 65, 1)),
        few=((40, 128, 1), (40, 128, 67, 130)),
        served=tuple((40, 128, length) for length in (2940, 4560, 11040)),
    ),
    OpCase(
        name="qk_norm_rope",
        operator=qk_norm_rope_,
        launch=launch_qk_norm_rope,
        reference=reference_qk_norm_rope_,
        inputs=_fused_projection,
        written=(0,),
        odd=_ODD_ROTATIONS,
        few=_FEW_ROTATIONS,
        served=_SERVED_ROTATIONS,
    ),
    OpCase(
        name="norm_rope",
        operator=norm_rope,
        launch=launch_norm_rope,
        reference=reference.norm_rope,
        inputs=_one_projection,
        odd=_ODD_ROTATIONS,
        few=_FEW_ROTATIONS,
        served=_SERVED_ROTATIONS,
    ),
    OpCase(
        name="rms_norm",
        operator=rms_norm,
        launch=launch_rms_norm,
        reference=reference.rms_norm,
        inputs=_weighted,
        odd=((1, 40), (67, 96), (13, 130)),
        few=((1, 5120), (67, 5120)),
        served=((540, 5120), (2160, 5120), (8640, 5120)),
    ),
    OpCase(
        name="linear_gelu",
        operator=gelu.linear_gelu,
        launch=gelu.linear_gelu,
        reference=reference.linear_gelu,
        inputs=_linear,
        odd=((1, 40, 24), (67, 24, 40), (13, 130, 7)),
        few=((1, 5120, 13824), (67, 5120, 13824)),
        served=((2940, 5120, 13824), (4560, 5120, 13824), (11040, 5120, 13824)),
    ),
)
