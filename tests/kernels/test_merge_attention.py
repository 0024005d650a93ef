"""Merging attention over parts of the keys: kernel, definition and operator, and a ring against the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helios_serve.kernels import reference
from helios_serve.kernels.cases_attention import MERGE
from helios_serve.kernels.launch import HAS_TRITON
from helios_serve.kernels.merge_attention import launch_merge_attention, merge_attention, merge_packed, merge_reference
from helios_serve.kernels.op_case import MARGIN, Shape

LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}  # sums are wide in all of them
Merge = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def _inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(sum(shape))
    return MERGE.inputs(shape, dtype)


def _assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], limit: float) -> None:
    for result, wanted in zip(actual, expected, strict=True):
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(result, wanted, rtol=limit, atol=8 * limit)


@needs_triton
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", MERGE.odd, ids=str)
def test_kernel_equals_its_definition(shape: Shape, dtype: torch.dtype) -> None:
    """Where neither has keys, the result is nothing: zero, with a log-sum-exp of -inf."""
    arguments = _inputs(shape, dtype)
    out, lse = launch_merge_attention(*arguments)
    _assert_same((out, lse), merge_reference(*arguments), LIMITS[dtype])
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    without_keys = lse[0] == -torch.inf
    assert without_keys.sum() == shape[0] // 35
    assert (out[without_keys] == 0).all()


@needs_triton
def test_kernel_takes_log_sum_exps_and_results_of_any_strides() -> None:
    out_a, lse_a, out_b, lse_b = _inputs((67, 3, 40), torch.float32)
    wide = torch.full((67, 2, 3, 40), torch.nan)
    wide[:, 1] = out_b
    results = launch_merge_attention(out_a, lse_a.T.contiguous().T, wide[:, 1], lse_b.T.contiguous().T)
    _assert_same(results, merge_reference(out_a, lse_a, out_b, lse_b), LIMITS[torch.float32])


@pytest.mark.parametrize(
    "merge", [merge_reference, merge_attention, pytest.param(launch_merge_attention, marks=needs_triton)]
)
def test_a_ring_of_parts_is_the_whole(merge: Merge) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 67, 2, 16, dtype=torch.float64).unbind(0)
    parts = [
        reference.attend(q, keys, values, 0.7)
        for keys, values in zip(k.split([1, 40, 5, 21]), v.split([1, 40, 5, 21]), strict=True)
    ]
    out, lse = parts[0]
    for part_out, part_lse in parts[1:]:
        out, lse = merge(out, lse, part_out, part_lse)
    _assert_same((out, lse), reference.attend(q, k, v, 0.7), 1e-13)


def test_far_apart_log_sum_exps_do_not_overflow() -> None:
    out_a, _, out_b, _ = _inputs((5, 2, 16), torch.float32)
    low, high = torch.full((2, 5), -1e4), torch.full((2, 5), 1e4)
    merges = [merge_reference, launch_merge_attention] if HAS_TRITON else [merge_reference]
    for merge in merges:
        out, lse = merge(out_a, low, out_b, high)
        assert torch.equal(out, out_b)
        assert torch.equal(lse, high)


def _mean(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def _in_base_two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp2(lse_a, lse_b)
    return out_a * (lse_a - lse).exp2().T[..., None] + out_b * (lse_b - lse).exp2().T[..., None], lse


def _swapped(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return merge_reference(out_b, lse_a, out_a, lse_b)


@pytest.mark.parametrize("mutant", [_mean, _in_base_two, _swapped])
def test_the_ring_notices_a_wrong_merge(mutant: Merge) -> None:
    with pytest.raises(AssertionError):
        test_a_ring_of_parts_is_the_whole(mutant)


@needs_triton
def test_nothing_else_is_written() -> None:
    arguments, before = _inputs((67, 3, 40), torch.float32), _inputs((67, 3, 40), torch.float32)
    launch_merge_attention(*arguments)
    for now, then in zip(arguments, before, strict=True):
        assert torch.equal(now, then)
        memory = now.as_strided((now.untyped_storage().nbytes() // now.itemsize,), (1,), 0)
        assert memory[:MARGIN].isnan().all()
        assert memory[-MARGIN:].isnan().all()


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_trace_sees_one_operator() -> None:
    arguments = _inputs((67, 3, 40), torch.float32)
    with _Trace() as trace:
        merge_attention(*arguments)
    assert trace.names == ["helios.merge_attention.default"]


def test_schema_and_shapes_hold() -> None:
    operator: Any = merge_packed
    arguments = tuple(_inputs((5, 3, 8), torch.float32))
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
