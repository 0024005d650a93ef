"""The Triton kernels of the modulated norms against their references, in Triton's interpreter.

The interpreter cuts floats off where a GPU rounds them to bfloat16. Here bfloat16 residuals are therefore exact sums,
and results may be one unit in the last place away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.adaln_norm import (
    launch_gated_residual_norm,
    launch_gated_residual_split_norm,
    launch_layer_norm,
    launch_layer_norm_modulate,
    launch_residual_scatter_norm,
)

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")

SIZES = ((1, 40), (67, 96), (13, 130))  # tokens, width
EPS = 0.05  # large enough to be seen in every dtype
NUM_ROWS = 4
HISTORY, REQUEST_A, REQUEST_B = 0, 1, 2  # modulation rows
SPARE = 2  # rows of `current` that nobody writes
# Allowed error: a share of the value itself, and a share of the largest value of its row.
LIMITS = {
    torch.float64: (0.0, 1e-13),
    torch.float32: (0.0, 1e-6),
    torch.float16: (2.0**-10, 1e-6),
    torch.bfloat16: (2.0**-7, 1e-6),
}
# The other dtypes run with all cases; the interpreter takes milliseconds for each token.
RUNS = [(size, torch.float16) for size in SIZES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs of all five operators; the tables are views [R, D] of one [R, 6, D] whose other parts are NaN."""

    x: Tensor
    y: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor
    weight: Tensor
    bias: Tensor
    row: Tensor
    place: Tensor
    index: Tensor


def _case(count: int, width: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(count * width)

    def values(*shape: int) -> Tensor:
        if dtype == torch.bfloat16:  # quarters up to 2: x + y * gate has at most 8 significant bits
            return torch.randint(-8, 9, shape) / 4
        return torch.randn(shape)

    table = torch.full((NUM_ROWS, 6, width), torch.nan)
    table[:, 1:4] = values(NUM_ROWS, 3, width)
    row = (torch.arange(count) % NUM_ROWS)[torch.randperm(count)].int()
    is_current = row != HISTORY
    place = torch.full((count,), -1, dtype=torch.int32)
    place[is_current] = torch.randperm(int(is_current.sum()), dtype=torch.int32)
    return Case(
        x=values(count, width).to(dtype),
        y=values(count, width).to(dtype),
        shift=table[:, 1],
        scale=table[:, 2],
        gate=table[:, 3],
        weight=torch.randn(width),
        bias=torch.randn(width),
        row=row,
        place=place,
        index=torch.randperm(count)[: (count + 1) // 2],
    )


Outcome = tuple[Tensor, ...]  # x afterwards, then what was computed
Run = Callable[..., Any]


def _layer_norm_modulate(run: Run, case: Case) -> Outcome:
    x = case.x.clone()
    return x, run(x, case.shift, case.scale, case.row, EPS)


def _layer_norm(run: Run, case: Case) -> Outcome:
    x = case.x.clone()
    return x, run(x, case.weight, case.bias, EPS)


def _gated_residual_norm(run: Run, case: Case) -> Outcome:
    x = case.x.clone()
    return x, run(x, case.y, case.gate, case.row, case.shift, case.scale, EPS)


def _gated_residual_split_norm(run: Run, case: Case) -> Outcome:
    x, normed = case.x.clone(), torch.full_like(case.x, torch.nan)
    current = case.x.new_full((int((case.place >= 0).sum()) + SPARE, case.x.shape[1]), torch.nan)
    tables = (case.shift, case.scale, case.weight, case.bias)
    run(x, case.y, case.gate, case.row, case.place, *tables, EPS, normed, current)
    return x, normed, current


def _residual_scatter_norm(run: Run, case: Case) -> Outcome:
    x, normed = case.x.clone(), torch.full_like(case.x, torch.nan)
    run(x, case.y[: len(case.index)], case.index, case.shift, case.scale, case.row, EPS, normed)
    return x, normed


OPERATORS = {
    "layer_norm_modulate": (_layer_norm_modulate, launch_layer_norm_modulate, reference.layer_norm_modulate),
    "layer_norm": (_layer_norm, launch_layer_norm, reference.layer_norm),
    "gated_residual_norm": (_gated_residual_norm, launch_gated_residual_norm, reference.gated_residual_norm),
    "gated_residual_split_norm": (
        _gated_residual_split_norm,
        launch_gated_residual_split_norm,
        reference.gated_residual_split_norm,
    ),
    "residual_scatter_norm": (_residual_scatter_norm, launch_residual_scatter_norm, reference.residual_scatter_norm),
}


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal within `LIMITS`, and NaN, which is to say not written, in the same places."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan()), "other rows were written"
    share, share_of_row = LIMITS[expected.dtype]
    wide, size = expected.double().nan_to_num(), expected.double().nan_to_num().abs()
    excess = (actual.double().nan_to_num() - wide).abs() - share * size - share_of_row * size.amax(-1, keepdim=True)
    assert excess.max() <= 0, f"over the limit by {excess.max()}"


def _assert_all_same(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for actual, wanted in zip(outputs, expected, strict=True):
        _assert_same(actual, wanted)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that a launch allocates itself start as NaN, too."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


@pytest.mark.parametrize(("size", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_kernel_equals_its_reference(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    apply, launch, plain = OPERATORS[name]
    case = _case(*size, dtype)
    x, *outputs = apply(launch, case)
    expected_x, *expected = apply(plain, case)
    assert torch.equal(x, expected_x)
    _assert_all_same(outputs, expected)


def test_sum_in_bfloat16_is_one_unit_away_at_most() -> None:
    case = _case(67, 96, torch.bfloat16)
    case = replace(case, x=torch.randn(67, 96).bfloat16(), y=torch.randn(67, 96).bfloat16(), gate=torch.randn(4, 96))
    for name in ("gated_residual_norm", "gated_residual_split_norm", "residual_scatter_norm"):
        apply, launch, plain = OPERATORS[name]
        _assert_same(apply(launch, case)[0], apply(plain, case)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_is_of_the_rounded_sum(dtype: torch.dtype) -> None:
    case = _case(67, 96, dtype)
    case = replace(case, x=(100 * torch.randn(67, 96)).to(dtype), y=torch.randn(67, 96).to(dtype))
    x, normed = _gated_residual_norm(launch_gated_residual_norm, case)
    _assert_same(normed, reference.layer_norm_modulate(x, case.shift, case.scale, case.row, EPS))


def test_split_writes_history_and_current_rows_only_to_their_places() -> None:
    case = _case(67, 40, torch.float32)
    _, normed, current = _gated_residual_split_norm(launch_gated_residual_split_norm, case)
    is_history = case.row == HISTORY
    assert normed[is_history].isfinite().all()
    assert normed[~is_history].isnan().all()
    assert current[:-SPARE].isfinite().all()
    assert current[-SPARE:].isnan().all()


def test_scatter_leaves_other_rows_alone() -> None:
    case = _case(67, 40, torch.float32)
    x, normed = _residual_scatter_norm(launch_residual_scatter_norm, case)
    is_other = torch.ones(67, dtype=torch.bool)
    is_other[case.index] = False
    assert torch.equal(x[is_other], case.x[is_other])
    assert normed[is_other].isnan().all()
    assert normed[~is_other].isfinite().all()


def test_constant_rows_become_their_shift() -> None:
    case = _case(13, 130, torch.float32)
    case = replace(case, x=torch.full((13, 130), 2.0))
    _, normed = _layer_norm_modulate(launch_layer_norm_modulate, case)
    _assert_same(normed, case.shift[case.row])


def _swap_requests(case: Case) -> Case:
    row = case.row.clone()
    row[case.row == REQUEST_A], row[case.row == REQUEST_B] = REQUEST_B, REQUEST_A
    return replace(case, row=row)


def _give_one_history_token_a_noise_row(case: Case) -> Case:
    row = case.row.clone()
    row[case.index[row[case.index] == HISTORY][0]] = REQUEST_A
    return replace(case, row=row)


def _exchange_two_places(case: Case) -> Case:
    place, (one, other) = case.place.clone(), (case.place >= 0).nonzero()[:2, 0]
    place[one], place[other] = case.place[other], case.place[one]
    return replace(case, place=place)


def _treat_one_history_token_as_current(case: Case) -> Case:
    place = case.place.clone()
    place[(place < 0).nonzero()[0]] = place.max() + 1
    return replace(case, place=place)


def _exchange_two_indices(case: Case) -> Case:
    return replace(case, index=torch.cat((case.index[1:2], case.index[:1], case.index[2:])))


def _exchange_tables(case: Case) -> Case:
    return replace(case, shift=case.scale, scale=case.shift, weight=case.bias, bias=case.weight)


WITH_ROWS = [name for name in OPERATORS if name != "layer_norm"]
MUTANTS = [
    *((name, _swap_requests) for name in WITH_ROWS),
    *((name, _give_one_history_token_a_noise_row) for name in WITH_ROWS),
    *((name, _exchange_tables) for name in OPERATORS),
    ("gated_residual_split_norm", _exchange_two_places),
    ("residual_scatter_norm", _exchange_two_indices),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "mutate"), MUTANTS)
def test_comparison_notices(name: str, mutate: Callable[[Case], Case], dtype: torch.dtype) -> None:
    apply, launch, plain = OPERATORS[name]
    case = _case(13, 40, dtype)
    outputs, expected = apply(launch, mutate(case))[1:], apply(plain, case)[1:]
    with pytest.raises(AssertionError, match="over the limit"):
        _assert_all_same(outputs, expected)


def test_comparison_notices_a_history_token_treated_as_current() -> None:
    case = _case(67, 40, torch.float32)
    mutant = _gated_residual_split_norm(launch_gated_residual_split_norm, _treat_one_history_token_as_current(case))
    expected = _gated_residual_split_norm(reference.gated_residual_split_norm, case)
    with pytest.raises(AssertionError, match="other rows were written"):
        _assert_same(mutant[1], expected[1])
