"""Cross-attention's Triton kernel in the interpreter, its definition and its operator, and pads that become one key.

The interpreter's matrix product takes bfloat16 for whole numbers: that dtype is for the tests on a GPU.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helios_serve.kernels import cross_attention, reference_cross
from helios_serve.kernels.attention import Segments, attend
from helios_serve.kernels.cases_cross import CASES, LAYER, segments_of
from helios_serve.kernels.cross_attention import PackedText, cross_attend, launch_cross_attend, places_of
from helios_serve.kernels.launch import HAS_TRITON
from helios_serve.kernels.op_case import Shape

(CASE,) = CASES
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.0**-9}
NUM_PADDED = 512
REAL_LENGTHS = (1, 37, 120, 226, 511, 512)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def _arguments(shape: Shape, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(sum(shape))
    return CASE.inputs(shape, dtype)


def _wide(arguments: list[Any]) -> list[Any]:
    q, keys, values, *others = arguments
    return [q.double(), [key.double() for key in keys], [value.double() for value in values], *others]


def _assert_close(actual: Tensor, exact: Tensor, limit: float) -> None:
    assert actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= limit * exact.abs().max()


@needs_triton
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", CASE.odd, ids=str)
def test_kernel_equals_its_definition(shape: Shape, dtype: torch.dtype) -> None:
    """In every layer but one, and around all tensors, there is NaN."""
    arguments = _arguments(shape, dtype)
    out = launch_cross_attend(*arguments)
    assert out.dtype == dtype
    _assert_close(out, reference_cross.cross_attend(*_wide(arguments)), LIMITS[dtype])


@needs_triton
def test_kernel_takes_many_queries_and_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments((2, 1, 16, 541, 67, 130, 67, 1, 9), torch.float32)
    exact = reference_cross.cross_attend(*_wide(arguments))
    for config in cross_attention.CONFIGS:
        monkeypatch.setattr(cross_attention, "WIDE_CONFIG", config)
        _assert_close(launch_cross_attend(*arguments), exact, LIMITS[torch.float32])


@needs_triton
def test_a_table_that_is_written_anew_leads_to_other_prompts() -> None:
    """As in a captured graph: the arguments stay, the table's contents change."""
    shape = (3, 2, 24, 20, 9, 60, 33, 4, 1)
    arguments = _arguments(shape, torch.float32)
    q, keys, values, layer, cu_q, repeats, scale, _ = arguments
    table = places_of(keys, values, cu_q, repeats)
    first = launch_cross_attend(q, keys, values, layer, cu_q, repeats, scale, table)
    others = [[torch.randn_like(key) for key in keys] for _ in range(2)]
    shorter = [[key[:, :-3].contiguous() for key in kind] for kind in others]
    table.copy_(places_of(*shorter, cu_q, [5, 2]))
    second = launch_cross_attend(q, keys, values, layer, cu_q, repeats, scale, table)
    _assert_close(first, reference_cross.cross_attend(*_wide(arguments)), 1e-6)
    exact = reference_cross.cross_attend(*_wide([q, *shorter, layer, cu_q, [5, 2], scale, None]))
    _assert_close(second, exact, 1e-6)
    assert not torch.equal(first, second)


@needs_triton
def test_nan_in_one_prompt_stays_there() -> None:
    arguments = _arguments((2, 1, 16, 20, 9, 60, 33, 4, 1), torch.float32)
    arguments[1][0][LAYER, 3] = torch.nan
    out = launch_cross_attend(*arguments)
    assert out[:20].isnan().all()
    assert out[20:].isfinite().all()


def test_without_repeats_it_is_attention_bit_by_bit() -> None:
    for shape in ((2, 3, 16, 67, 40, 1), (2, 3, 16, 67, 5, 40, 7, 1, 1)):
        arguments = _arguments(shape, torch.float32)
        q, keys, values, layer, cu_q, *_, scale, _ = arguments
        text = PackedText(
            keys=tuple(keys), values=tuple(values), repeats=segments_of(shape)[2], cu_q=tuple(cu_q), scale=scale
        )
        packed = (torch.cat([part[layer] for part in parts]) for parts in (keys, values))
        cu_k = tuple(torch.tensor([0, *(len(key[layer]) for key in keys)]).cumsum(0).tolist())
        expected, _ = attend(q, *packed, Segments(cu_q=tuple(cu_q), cu_k=cu_k, scale=scale))
        assert torch.equal(cross_attend(q, text, layer), expected)


def _padded(num_real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a prompt whose tail is one row again and again."""
    generator = torch.Generator().manual_seed(num_real)
    q = torch.randn(23, 2, 16, dtype=torch.float64, generator=generator)
    keys, values = torch.randn(2, NUM_PADDED, 2, 16, dtype=torch.float64, generator=generator)
    for tensor in (keys, values):
        tensor[num_real:] = tensor[-1].clone()
    return q, keys, values


def _collapsed(q: Tensor, keys: Tensor, values: Tensor, num_keys: int, repeats: int, *, is_kernel: bool) -> Tensor:
    run = launch_cross_attend if is_kernel else reference_cross.cross_attend
    kept = ([keys[None, :num_keys].contiguous()], [values[None, :num_keys].contiguous()])
    return run(q, *kept, 0, [0, len(q)], [repeats], 0.25, None)


@pytest.mark.parametrize("num_real", REAL_LENGTHS)
@pytest.mark.parametrize("is_kernel", [pytest.param(True, marks=needs_triton), False], ids=["kernel", "definition"])
def test_one_key_stands_for_all_pads(num_real: int, is_kernel: bool) -> None:
    q, keys, values = _padded(num_real)
    exact, _ = attend(q, keys, values, Segments(cu_q=(0, len(q)), cu_k=(0, NUM_PADDED), scale=0.25))
    num_keys, repeats = min(num_real + 1, NUM_PADDED), max(1, NUM_PADDED - num_real)
    _assert_close(_collapsed(q, keys, values, num_keys, repeats, is_kernel=is_kernel), exact, 1e-13)
    mutants = [(num_keys, repeats + 1)]
    if repeats > 1:
        mutants += [(num_keys, repeats - 1), (num_keys, 1), (num_keys - 1, 1)]
    for wrong_keys, wrong_repeats in mutants:
        wrong = _collapsed(q, keys, values, wrong_keys, wrong_repeats, is_kernel=is_kernel)
        with pytest.raises(AssertionError):
            _assert_close(wrong, exact, 1e-6)


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", CASE.odd, ids=str)
def test_it_is_one_operator_whose_work_is_counted(shape: Shape) -> None:
    arguments = _arguments(shape, torch.float32)
    with _Trace() as trace:
        CASE.operator(*arguments)
    assert trace.names == ["helios::cross_attend"]
    with FlopCounterMode(display=False) as counter:
        CASE.operator(*arguments)
    queries, keys, _ = segments_of(shape)
    assert counter.get_total_flops() == 4 * math.prod(shape[1:3]) * sum(map(operator.mul, queries, keys))


def test_shapes_and_schema_hold() -> None:
    arguments = tuple(_arguments(CASE.odd[1], torch.bfloat16))
    registered: Any = CASE.operator
    torch.library.opcheck(registered, arguments, test_utils=("test_schema", "test_faketensor"))
    names = [one.name for one in registered._schema.arguments]
    assert [*inspect.signature(CASE.launch).parameters] == names
    assert [*inspect.signature(CASE.reference).parameters] == names
