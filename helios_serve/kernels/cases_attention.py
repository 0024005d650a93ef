"""Self-attention and its merge as cases: what tests compare and benchmarks time.

Shapes of attention are (heads, head size, queries of each segment, then keys of each segment), those of merging
(tokens, heads, head size).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels.attention import AUTO, Segments
from helios_serve.kernels.attention.operator import attend_packed
from helios_serve.kernels.attention.torch_attention import attend_math
from helios_serve.kernels.attention.triton_attention import attend_triton
from helios_serve.kernels.merge_attention import launch_merge_attention, merge_packed, merge_reference
from helios_serve.kernels.op_case import OpCase, Shape, poisoned

SERVED_LENGTHS = (2940, 4560, 11040)
"""Tokens of one sequence in the three stages of 640x384."""


def bounds_of(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """cu_q and cu_k of a shape of attention."""
    lengths = shape[2:]
    middle = len(lengths) // 2
    return (0, *accumulate(lengths[:middle])), (0, *accumulate(lengths[middle:]))


def _attended(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """Queries, keys and values as the fused projection leaves them: parts of wider rows, whose remainder is NaN."""
    heads, head_dim = shape[:2]
    cu_q, cu_k = bounds_of(shape)
    q = _part_of_wider((cu_q[-1], heads, head_dim), dtype)
    k, v = (_part_of_wider((cu_k[-1], heads, head_dim), dtype) for _ in range(2))
    return [q, k, v, list(cu_q), list(cu_k), head_dim**-0.5, None, AUTO]


def _part_of_wider(shape: Shape, dtype: torch.dtype) -> Tensor:
    count, heads, head_dim = shape
    wider = poisoned(torch.full((count, 3, heads, head_dim), torch.nan).to(dtype))
    wider[:, 1] = torch.randn(shape).to(dtype)
    return wider[:, 1]


def _merged(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """A wide sum and one more part, of which some tokens see no keys at all in one or in both."""
    count, heads, _ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse_a, lse_b = (3 * torch.randn(heads, count, dtype=wide) for _ in range(2))
    out_a, out_b = torch.randn(shape, dtype=wide), torch.randn(shape).to(dtype)
    for out, lse, every in ((out_a, lse_a, 5), (out_b, lse_b, 7)):
        lse[:, every - 1 :: every] = -torch.inf
        out[every - 1 :: every] = 0
    return [poisoned(out_a), poisoned(lse_a), poisoned(out_b), poisoned(lse_b)]


def _with_bounds(run: Callable[[Tensor, Tensor, Tensor, Segments], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """`run` with the operator's arguments."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: list[int],
        cu_k: list[int],
        scale: float,
        key_bias: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        assert backend == AUTO
        return run(q, k, v, Segments(cu_q=tuple(cu_q), cu_k=tuple(cu_k), scale=scale, key_bias=key_bias))

    return call


ATTEND = OpCase(
    name="attend",
    operator=attend_packed,
    launch=_with_bounds(attend_triton),
    reference=_with_bounds(attend_math),
    inputs=_attended,
    odd=((2, 16, 1, 1), (2, 40, 67, 541), (1, 24, 1, 67, 13, 67, 1, 200), (2, 128, 31, 33, 1, 40, 130, 129, 5, 1)),
    served=(
        *((40, 128, length, length) for length in SERVED_LENGTHS),
        (40, 128, 2940, 4560, 2940, 4560),
        (40, 128, 540, 2940),
    ),
)
MERGE = OpCase(
    name="merge_attention",
    operator=merge_packed,
    launch=launch_merge_attention,
    reference=merge_reference,
    inputs=_merged,
    odd=((1, 1, 8), (67, 3, 40), (541, 2, 128)),
    served=tuple((length, 40, 128) for length in (544, 2940, 11040)),
)
CASES: tuple[OpCase, ...] = (ATTEND, MERGE)
