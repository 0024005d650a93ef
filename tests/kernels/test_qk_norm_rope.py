"""The Triton kernels of norm, rotation and key scale against their references, in Triton's interpreter.

The interpreter cuts floats off where a GPU rounds them to bfloat16: one unit in the last place for each rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.qk_norm_rope import launch_norm_rope, launch_qk_norm_rope, launch_rms_norm

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")

SIZES = ((1, 1, 12, 0), (1, 5, 8, 5), (1, 40, 8, 1), (67, 5, 8, 5), (13, 5, 8, 1), (13, 40, 8, 40), (13, 3, 128, 0))
EPS = 0.05  # large enough to be seen in every dtype
# Allowed error of a rounding: a share of the length of the channel pair, which a rotation does not change.
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The interpreter takes milliseconds for each token.
RUNS = [(size, dtype) for size in SIZES for dtype in LIMITS if size[0] < 67 or dtype == torch.float16]
Size = tuple[int, int, int, int]  # tokens, heads, head size, and scales of the history: 0 for none, 1 for all heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs of all three operators; `qkv` is a part of a wider tensor whose remainder is NaN."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    rotary: Tensor
    history_scale: Tensor | None
    row: Tensor


def _case(size: Size, dtype: torch.dtype) -> Case:
    count, heads, dim, num_scales = size
    torch.manual_seed(count * heads * dim)
    wider = torch.full((count, 4, heads, dim), torch.nan, dtype=dtype)
    wider[:, :3] = torch.randn(count, 3, heads, dim)
    q_weight, k_weight = torch.randn(2, heads * dim).to(dtype)
    return Case(
        qkv=wider[:, :3],
        q_weight=q_weight,
        k_weight=k_weight,
        rotary=torch.randn(count, 2, dim // 2),  # as averaged rows, no unit vectors
        history_scale=1.5 + torch.rand(num_scales) if num_scales else None,
        row=(torch.arange(count) % 3)[torch.randperm(count)].int(),
    )


def _fused(case: Case) -> Tensor:
    """What `launch_qk_norm_rope` makes of a copy with the same strides: [N, 4, H, Dh]."""
    count, _, heads, dim = case.qkv.shape
    wider = torch.full((count, 4, heads, dim), torch.nan, dtype=case.qkv.dtype)
    wider[:, :3] = case.qkv
    launch_qk_norm_rope(wider[:, :3], case.q_weight, case.k_weight, case.rotary, EPS, case.history_scale, case.row)
    return wider


def _reference(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return reference.qk_norm_rope(
        case.qkv, case.q_weight, case.k_weight, case.rotary, EPS, case.history_scale, case.row
    )


def _assert_same(actual: Tensor, expected: Tensor, num_roundings: int) -> None:
    """Each channel pair is within `LIMITS` of the expected one."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    pairs = expected.double().unflatten(-1, (-1, 2))
    error = (actual.double().unflatten(-1, (-1, 2)) - pairs).norm(dim=-1)
    limit = LIMITS[expected.dtype] * pairs.norm(dim=-1)
    if expected.dtype in (torch.float16, torch.bfloat16):
        limit = num_roundings * limit + 1e-6  # float32 sums before the rounding, and float16's smallest numbers
    excess = (error - limit).max()
    assert excess <= 0, f"over the limit by {excess}"


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that a launch allocates itself start as NaN."""
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))


@pytest.mark.parametrize(("size", "dtype"), RUNS, ids=str)
def test_fused_kernel_changes_q_and_k_in_place(size: Size, dtype: torch.dtype) -> None:
    case = _case(size, dtype)
    q, k, v, rest = _fused(case).unbind(1)
    expected_q, expected_k, expected_v = _reference(case)
    _assert_same(q, expected_q, 2)
    _assert_same(k, expected_k, 3)
    assert torch.equal(v, expected_v)
    assert rest.isnan().all()


@pytest.mark.parametrize(("size", "dtype"), RUNS, ids=str)
def test_one_strided_tensor_alone(size: Size, dtype: torch.dtype) -> None:
    case = _case(size, dtype)
    keys, before = case.qkv[:, 1], case.qkv.clone()
    arguments = (keys, case.k_weight, case.rotary, EPS, case.history_scale, case.row)
    _assert_same(launch_norm_rope(*arguments), reference.norm_rope(*arguments), 3)
    assert torch.equal(case.qkv, before)


@pytest.mark.parametrize(("size", "dtype"), RUNS, ids=str)
def test_rms_norm_of_strided_rows(size: Size, dtype: torch.dtype) -> None:
    case = _case(size, dtype)
    rows, before = case.qkv[:, 1].flatten(1), case.qkv.clone()
    assert size[0] == 1 or not rows.is_contiguous()
    actual = launch_rms_norm(rows, case.k_weight, EPS)
    _assert_same(actual, reference.rms_norm(rows, case.k_weight, EPS), 1)
    assert torch.equal(case.qkv, before)


def test_float16_is_rounded_where_the_reference_rounds() -> None:
    case = _case((67, 5, 8, 5), torch.float16)
    for actual, expected in zip(_fused(case).unbind(1), _reference(case), strict=False):
        assert (actual != expected).float().mean() < 0.02  # a rounding more or less changes a quarter


def test_rows_of_zeros_stay_zero() -> None:
    assert torch.equal(launch_rms_norm(torch.zeros(3, 40), torch.randn(40), EPS), torch.zeros(3, 40))


def test_without_scale_no_rows_are_needed() -> None:
    case = _case((13, 5, 8, 0), torch.float32)
    arguments = (case.qkv[:, 0], case.q_weight, case.rotary, EPS, None, None)
    _assert_same(launch_norm_rope(*arguments), reference.norm_rope(*arguments), 2)


def _give_one_history_token_a_noise_row(case: Case) -> Case:
    row = case.row.clone()
    row[(row == 0).nonzero()[0]] = 1
    return replace(case, row=row)


def _give_one_noise_token_the_history_row(case: Case) -> Case:
    row = case.row.clone()
    row[(row == 1).nonzero()[0]] = 0
    return replace(case, row=row)


def _swap_history_and_a_request(case: Case) -> Case:
    row = case.row.clone()
    row[case.row == 0], row[case.row == 1] = 1, 0
    return replace(case, row=row)


def _swap_positions_of_two_requests(case: Case) -> Case:
    rotary, one, other = case.rotary.clone(), (case.row == 1).nonzero()[:, 0], (case.row == 2).nonzero()[:, 0]
    length = min(len(one), len(other))
    rotary[one[:length]], rotary[other[:length]] = case.rotary[other[:length]], case.rotary[one[:length]]
    return replace(case, rotary=rotary)


def _swap_weights(case: Case) -> Case:
    return replace(case, q_weight=case.k_weight, k_weight=case.q_weight)


def _shift_scales_by_a_head(case: Case) -> Case:
    assert case.history_scale is not None
    return replace(case, history_scale=case.history_scale.roll(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mutate",
    [
        _give_one_history_token_a_noise_row,
        _give_one_noise_token_the_history_row,
        _swap_history_and_a_request,
        _swap_positions_of_two_requests,
        _swap_weights,
        _shift_scales_by_a_head,
    ],
)
def test_comparison_notices(mutate: Callable[[Case], Case], dtype: torch.dtype) -> None:
    case = _case((13, 5, 8, 5), dtype)
    keys, expected = _fused(mutate(case))[:, 1], _reference(case)[1]
    with pytest.raises(AssertionError, match="over the limit"):
        _assert_same(keys, expected, 3)


def test_comparison_notices_queries_scaled_like_keys() -> None:
    case = _case((13, 5, 8, 5), torch.bfloat16)
    scaled = launch_norm_rope(case.qkv[:, 0], case.q_weight, case.rotary, EPS, case.history_scale, case.row)
    with pytest.raises(AssertionError, match="over the limit"):
        _assert_same(scaled, _reference(case)[0], 2)
