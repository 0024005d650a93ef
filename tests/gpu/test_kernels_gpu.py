"""Every operator on a real GPU: its kernel against the definition in float64, in real shapes and in odd ones.

What the interpreter cannot know is tested here: compiled code, rounding by the device, races. Run with
TRITON_INTERPRET=0, as `make test-gpu` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_serve import kernels
from helios_serve.kernels.cases import CASES
from helios_serve.kernels.fp8 import FP8
from helios_serve.kernels.op_case import MARGIN, OpCase, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET=0: compiled kernels"),
]

DISTANCE = 1.05
"""How much farther from the exact result than the definition in bfloat16 a kernel may be."""
LIMIT = 1e-6
"""Relative distance in float32, of which only sums are in another order."""
LIMIT_E4M3 = 2e-3
"""The same with results in e4m3, where another order of sums moves a few values to the next number."""
LIMIT_BY_LIBRARY = {"linear_gelu": 1e-5}
"""The same of what a library computes its own way: cuBLAS's GELU is 2.5e-6 off, products in TF32 would be 1e-4."""
LARGE = 1 << 28
"""Arguments with more values are compared in float32: float64 would take tens of gigabytes."""
PART = 1 << 26
"""Values that are compared at a time: there is no room for copies of the largest results."""
RUNS = [
    *((case, shape, torch.float32) for case in CASES for shape in case.odd),
    *((case, shape, torch.bfloat16) for case in CASES for shape in (*case.few, *case.served)),
]


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def _arguments(case: OpCase, shape: Shape, dtype: torch.dtype) -> list[Any]:
    """The same ones in each call, on the device; unlike the interpreter it rounds, so any values will do."""
    torch.manual_seed(sum(shape))
    with torch.device("cuda"):
        arguments = case.inputs(shape, dtype)
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != FP8:
                argument.mul_(1 + 0.1 * torch.randn(argument.shape))
    return arguments


def _widened(arguments: Sequence[Any], wide: torch.dtype) -> list[Any]:
    """Floating-point tensors in `wide`, but for results in e4m3 and the scales that follow them."""
    widened = []
    for argument, previous in zip(arguments, (None, *arguments), strict=False):
        is_quantised = any(isinstance(one, Tensor) and one.dtype == FP8 for one in (argument, previous))
        is_widened = isinstance(argument, Tensor) and argument.is_floating_point() and not is_quantised
        widened.append(argument.to(wide) if is_widened else argument)
    return widened


def _values(outcome: Sequence[Tensor]) -> list[Tensor]:
    """What the results stand for: rows in e4m3 are multiplied by the scales that follow them."""
    following = iter(outcome)
    return [result.double() * next(following) if result.dtype == FP8 else result for result in following]


def _distance(one: Tensor, truth: Tensor, is_written: Tensor) -> Tensor:
    """The norm of the difference, in the dtype of `truth`, over what was written."""
    parts = zip(*(x.flatten().split(PART) for x in (one, truth, is_written)), strict=True)
    norms = [torch.where(written, left.to(right.dtype) - right, 0.0).norm() for left, right, written in parts]
    return torch.stack(norms).norm()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _margins(arguments: Sequence[Any]) -> list[Tensor]:
    """Around each tensor that lies between margins."""
    found = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            size = argument.untyped_storage().nbytes() // argument.itemsize
            memory = argument.as_strided((size,), (1,), 0)
            found += [memory[:MARGIN].clone(), memory[-MARGIN:].clone()]
    return found


@pytest.mark.parametrize(("case", "shape", "dtype"), RUNS, ids=lambda x: x.name if isinstance(x, OpCase) else str(x))
@torch.inference_mode()
def test_kernel_is_as_near_to_exact_as_its_definition(case: OpCase, shape: Shape, dtype: torch.dtype) -> None:
    arguments = _arguments(case, shape, dtype)
    margins = _margins(arguments)
    wide = torch.float64 if arguments[0].numel() <= LARGE else torch.float32
    outcome = case.outcome(case.operator, arguments)
    for now, before in zip(_margins(arguments), margins, strict=True):
        assert torch.equal(_bytes(now), _bytes(before)), "written outside of a tensor"
    expected = case.outcome(case.reference, _arguments(case, shape, dtype))
    for actual, wanted in zip(outcome, expected, strict=True):
        assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
        if case.is_exact:
            assert torch.equal(_bytes(actual), _bytes(wanted)), "other bits"
    if case.is_exact:
        return  # as far from exact as the definition
    exact = case.outcome(case.reference, _widened(_arguments(case, shape, dtype), wide))
    if "residual" in case.name:
        assert torch.equal(arguments[0], expected[-len(case.written)]), "the stream has other bits"
    for actual, wanted, truth in zip(*(_values(results) for results in (outcome, expected, exact)), strict=True):
        is_written = ~truth.isnan()
        assert torch.equal(~actual.isnan(), is_written), "other rows were written"
        truth = truth.to(wide).nan_to_num_()
        ours, theirs = (_distance(one, truth, is_written) for one in (actual, wanted))
        size = truth.norm()
        share = LIMIT_E4M3 if any(one.dtype == FP8 for one in outcome) else LIMIT_BY_LIBRARY.get(case.name, LIMIT)
        limit = DISTANCE * theirs if dtype == torch.bfloat16 else share * size + theirs
        assert ours <= limit, f"{ours / size:.3e} from exact, the definition {theirs / size:.3e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_same_input_twice_gives_the_same_bits(case: OpCase) -> None:
    """A race would show."""
    shape = min(case.served)
    first = case.outcome(case.operator, _arguments(case, shape, torch.bfloat16))
    for _ in range(3):
        again = case.outcome(case.operator, _arguments(case, shape, torch.bfloat16))
        for one, other in zip(first, again, strict=True):
            assert torch.equal(_bytes(one), _bytes(other))


def _kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches; to clear a few bytes is none."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.self_device_time_total > 0]
    return [name for name in names if not name.startswith("Memset")]


@pytest.mark.parametrize("rows", [2940, 4560, 11040])
@torch.inference_mode()
def test_gelu_is_part_of_the_product(rows: int) -> None:
    with torch.device("cuda"):
        x, weight = torch.randn(rows, 5120).bfloat16(), (torch.randn(13824, 5120) / 72).bfloat16()
        bias = torch.randn(13824).bfloat16()
    launched = _kernels_of(lambda: kernels.linear_gelu(x, weight, bias))
    assert len(launched) == 1, launched
