"""Cross-attention as a case: what tests compare and benchmarks time.

Shapes are (layers, heads, head size, queries of each segment, keys of each segment, repeats of each last key).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from helios_serve.kernels import cross_attention, reference_cross
from helios_serve.kernels.cross_attention import places_of
from helios_serve.kernels.op_case import OpCase, Shape, poisoned

LAYER = 1  # of the two or more that a shape has


def segments_of(shape: Shape) -> tuple[Shape, Shape, Shape]:
    """The lengths of all segments: queries, keys, repeats."""
    count = (len(shape) - 3) // 3
    return shape[3 : 3 + count], shape[3 + count : 3 + 2 * count], shape[3 + 2 * count :]


def _inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    layers, heads, head_dim = shape[:3]
    queries, keys, repeats = segments_of(shape)

    def drawn(count: int) -> torch.Tensor:
        made = torch.full((layers, count, heads, head_dim), torch.nan, dtype=dtype)
        made[LAYER] = torch.randn(count, heads, head_dim).to(dtype)
        return poisoned(made)

    q = poisoned(torch.randn(sum(queries), heads, head_dim).to(dtype))
    text_keys, text_values = ([drawn(count) for count in keys] for _ in range(2))
    cu_q = [0, *accumulate(queries)]
    places = places_of(text_keys, text_values, cu_q, repeats).to(q.device) if q.is_cuda else None
    return [q, text_keys, text_values, LAYER, cu_q, list(repeats), head_dim**-0.5, places]


CASES: tuple[OpCase, ...] = (
    OpCase(
        name="cross_attend",
        operator=cross_attention._cross_attend,
        launch=cross_attention.launch_cross_attend,
        reference=reference_cross.cross_attend,
        inputs=_inputs,
        odd=((2, 1, 8, 1, 1, 7), (3, 2, 24, 67, 1, 38, 121, 3, 392), (2, 5, 16, 13, 0, 5, 37, 64, 65, 475, 1, 447)),
        served=tuple(
            (2, 40, 128, *queries, *(121 for _ in queries), *(392 for _ in queries))
            for queries in ((540,), (2160,), (8640,), (8640, 540))
        ),
    ),
)
