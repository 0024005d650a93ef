"""Every operator of the transformer: its kernel in Triton's interpreter, its definition and its registration agree.

The interpreter cuts floats off where a GPU rounds them to bfloat16. To e4m3 it rounds the middle of two numbers away
from zero, and loses the carry where rounding ends at a power of two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helios_serve import kernels
from helios_serve.kernels import cases, reference
from helios_serve.kernels.cases_transformer import CASES
from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.op_case import MARGIN, OpCase, Shape
from helios_serve.kernels.quantize_rows import launch_quantize_rows

# Allowed error for inputs of a dtype, as a share of the largest value of a row; four units in bfloat16.
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-5}
PLAIN = {"linear_gelu"}
"""They have no kernel and no name in the dispatcher: a library's epilogue does it on a GPU."""
ELSEWHERE = {"attend", "cross_attend", "merge_attention", "vae_convolve"}
"""Attention, whose cases are beside this list, and what has no kernel in this package."""
RUNS = [(case, shape, dtype) for case in CASES for shape in case.odd for dtype in LIMITS]
OPERATORS = [case for case in CASES if case.name not in PLAIN]


def _arguments(case: OpCase, shape: Shape, dtype: torch.dtype) -> list[Any]:
    """The same ones in each call."""
    torch.manual_seed(sum(shape))
    return case.inputs(shape, dtype)


def _assert_same(actual: Tensor, expected: Tensor, limit: float) -> None:
    """With limit 0 in every bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan()), "other rows were written"
    if expected.dtype == FP8:
        _assert_same_codes(actual, expected, 1 if limit else 0)
        return
    if expected.dtype == torch.float32 and limit:
        limit = max(limit, LIMITS[torch.float32])
    wide = expected.double().nan_to_num()
    excess = (actual.double().nan_to_num() - wide).abs() - limit * wide.abs().amax(-1, keepdim=True)
    assert excess.max() <= 0, f"over the limit by {excess.max()}"


def _assert_same_codes(actual: Tensor, expected: Tensor, limit: int) -> None:
    """e4m3 numbers are at most `limit` units apart."""
    codes, wanted = (_codes(x) for x in (actual, expected))
    doubled = _codes((2 * actual.float()).clamp(-448, 448).to(FP8))
    is_carry_lost = (actual.float().frexp().mantissa.abs() == 0.5) & ((doubled - wanted).abs() <= limit)
    distance = torch.where(is_carry_lost, 0, (codes - wanted).abs())
    assert distance.max() <= limit, f"over the limit: {distance.max()} units"
    assert is_carry_lost.double().mean() < 0.1


def _codes(x: Tensor) -> Tensor:
    """Whole numbers in the order of the values."""
    bits = x.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def _tensors(arguments: list[Any]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def _memory(x: Tensor) -> Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).view(torch.uint8)


@pytest.mark.parametrize(("case", "shape", "dtype"), RUNS, ids=lambda x: x.name if isinstance(x, OpCase) else str(x))
def test_kernel_equals_its_definition(case: OpCase, shape: Shape, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")
    arguments, before = _arguments(case, shape, dtype), _arguments(case, shape, dtype)
    outcome = case.outcome(case.launch, arguments)
    expected = case.outcome(case.reference, _arguments(case, shape, dtype))
    for actual, wanted in zip(outcome, expected, strict=True):
        _assert_same(actual, wanted, 0.0 if case.is_exact and dtype != torch.bfloat16 else LIMITS[dtype])
    written = {id(arguments[index]) for index in case.written}
    for argument, old in zip(_tensors(arguments), _tensors(before), strict=True):
        now, then = _memory(argument), _memory(old)
        margin = MARGIN * argument.itemsize
        assert id(argument) in written or torch.equal(now, then)
        assert torch.equal(now[:margin], then[:margin]), "written before the tensor"
        assert torch.equal(now[-margin:], then[-margin:]), "written behind the tensor"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_without_gpu_is_the_definition(case: OpCase) -> None:
    for dtype in LIMITS:
        outcome = case.outcome(case.operator, _arguments(case, case.odd[1], dtype))
        expected = case.outcome(case.reference, _arguments(case, case.odd[1], dtype))
        for actual, wanted in zip(outcome, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.name)
def test_trace_sees_one_operator(case: OpCase) -> None:
    arguments = _arguments(case, case.odd[1], torch.float32)
    with _Trace() as trace:
        case.operator(*arguments)
    assert len(trace.names) == 1
    assert trace.names[0].startswith("helios.")


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.name)
def test_shapes_and_schema_hold(case: OpCase) -> None:
    """By PyTorch's own check: fake tensors give the same shapes, and only marked arguments change."""
    arguments = _arguments(case, case.odd[1], torch.bfloat16)
    has_fp8 = any(argument.dtype == FP8 for argument in _tensors(arguments))
    checks = ("test_faketensor",) if has_fp8 else ("test_schema", "test_faketensor")  # e4m3 cannot be compared there
    operator: Any = case.operator
    torch.library.opcheck(operator, tuple(arguments), test_utils=checks)
    schema = operator._schema.arguments
    marked = tuple(index for index, one in enumerate(schema) if one.alias_info is not None and one.alias_info.is_write)
    assert marked == case.written


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.name)
def test_kernel_and_definition_share_their_signature(case: OpCase) -> None:
    names = [one.name for one in case.operator._schema.arguments]  # type: ignore[attr-defined]
    assert [*inspect.signature(case.launch).parameters] == names
    assert [*inspect.signature(case.reference).parameters] == names


def test_public_function_and_definition_share_their_signature() -> None:
    for name in ("qk_norm_rope", "linear_gelu"):
        ours, defined = (inspect.signature(vars(module)[name]) for module in (kernels, reference))
        assert ours == defined, name


def test_every_operator_has_a_case() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("helios::")}
    operators: list[Any] = [case.operator for case in cases.CASES if case.name not in PLAIN]
    with_case = {operator._schema.name.partition("::")[2] for operator in operators}
    assert names - ELSEWHERE == with_case


def _with_one_scale_for_all(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.float().abs().amax() / 448).expand(len(x), 1).clone()
    return (x.float() / scale).to(FP8), scale


def _towards_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, scale = reference.quantize_rows(x)
    codes = rows.view(torch.uint8)
    is_larger = (rows.float() * scale).abs() > x.float().abs()
    return (codes - is_larger.to(torch.uint8)).view(FP8), scale


@pytest.mark.parametrize("mutant", [_with_one_scale_for_all, _towards_zero])
def test_comparison_notices_other_rounding(mutant: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    x = torch.randn(13, 40)
    for actual, wanted in zip(mutant(x), reference.quantize_rows(x), strict=True):
        if torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8)):
            continue
        with pytest.raises(AssertionError, match="over the limit"):
            _assert_same(actual, wanted, 0.0)
        return
    pytest.fail("the mutant changes nothing")


def test_comparison_notices_swapped_requests() -> None:
    (case,) = (case for case in CASES if case.name == "layer_norm_modulate_fp8")
    arguments = _arguments(case, case.odd[1], torch.bfloat16)
    expected, _ = case.reference(*arguments)
    row = arguments[3]
    row[:] = torch.where(row == 0, 0, 3 - row)
    actual, _ = case.launch(*arguments)
    with pytest.raises(AssertionError, match="over the limit"):
        _assert_same(actual, expected, LIMITS[torch.bfloat16])


def test_rows_of_zeros_have_scale_one() -> None:
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")
    rows, scale = launch_quantize_rows(torch.zeros(3, 40))
    assert torch.equal(rows.float(), torch.zeros(3, 40))
    assert torch.equal(scale, torch.ones(3, 1))


def test_e4m3_numbers_with_their_largest_in_each_row_are_kept() -> None:
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter, and Triton is not installed")
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[codes % 128 != 127].view(FP8)  # all but NaN
    factors = 2.0 ** torch.arange(-3, 4)[:, None]
    rows, scale = launch_quantize_rows(numbers.float() * factors)
    assert torch.equal(scale, factors)
    assert torch.equal(rows.view(torch.uint8), numbers.view(torch.uint8).expand(7, -1))
