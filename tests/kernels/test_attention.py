"""Attention: the Triton kernel in the interpreter, the choice of a backend, and the one operator in front of them.

The interpreter's matrix product takes bfloat16 for whole numbers: that dtype is for the tests on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helios_serve import kernels
from helios_serve.kernels import reference
from helios_serve.kernels.attention import (
    BACKENDS,
    NAMES,
    AttentionBackendError,
    Segments,
    attend,
    backend_for,
    backends,
    check_backend,
    library_attention,
    obstacles,
    torch_attention,
    triton_attention,
)
from helios_serve.kernels.attention.segments import on_device
from helios_serve.kernels.attention.triton_attention import (
    CANDIDATES,
    Tiles,
    block_table,
    default_tiles,
    launch_attend,
    tiles_for,
)
from helios_serve.kernels.cases_attention import ATTEND, bounds_of
from helios_serve.kernels.op_case import Shape

LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3}
SPARE = 3  # rows behind the last segment
SMALL = Tiles(queries=16, keys=16, num_warps=1, num_stages=1)
CUDA = torch.device("cuda", 0)
DENSE = backends.Problem(
    device=CUDA, capability=90, dtype=torch.bfloat16, head_dim=128, cu_q=(0, 67), cu_k=(0, 67), has_bias=False
)
PACKED = replace(DENSE, cu_q=(0, 67, 70), cu_k=(0, 5, 9))

needs_triton = pytest.mark.skipif(not backends.HAS_TRITON, reason="Triton is not installed")


def _inputs(shape: Shape, dtype: torch.dtype, *, is_biased: bool = False) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """With rows of NaN behind the last segment."""
    torch.manual_seed(sum(shape))
    q, k, v, cu_q, cu_k, scale, *_ = ATTEND.inputs(shape, dtype)
    tailed = [torch.cat((x, torch.full_like(x[:1], torch.nan).expand(SPARE, -1, -1))) for x in (q, k, v)]
    bias = torch.randn(len(tailed[1])) if is_biased else None
    return tailed[0], tailed[1], tailed[2], Segments(cu_q=tuple(cu_q), cu_k=tuple(cu_k), scale=scale, key_bias=bias)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch_attention.empty_results(q)
    return out.fill_(torch.nan), lse.fill_(torch.nan)


def _run(q: Tensor, k: Tensor, v: Tensor, segments: Segments, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    out, lse = _results(q)
    launch_attend(q, k, v, segments, out, lse, tiles)
    return out, lse


def _exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """By the definition in float64, one segment after the other; NaN behind the last one."""
    out, lse = _results(q.double())
    for (q0, q1), (k0, k1) in zip(pairwise(segments.cu_q), pairwise(segments.cu_k), strict=True):
        bias = None if segments.key_bias is None else segments.key_bias[k0:k1].double()
        parts = (q[q0:q1].double(), k[k0:k1].double(), v[k0:k1].double())
        out[q0:q1], lse[:, q0:q1] = reference.attend(*parts, segments.scale, bias)
    return out, lse


def _assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], limit: float) -> None:
    """Also that the same elements are NaN: what must not be written is not."""
    for result, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=0, atol=limit, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", ATTEND.odd, ids=str)
def test_kernel_equals_its_definition(shape: Shape, dtype: torch.dtype, is_biased: bool) -> None:
    q, k, v, segments = _inputs(shape, dtype, is_biased=is_biased)
    out, lse = _run(q, k, v, segments)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _assert_close((out, lse), _exact(q, k, v, segments), LIMITS[dtype])


@needs_triton
@pytest.mark.parametrize("lengths", [(1, 1), (67, 67), (541, 541), (1, 541), (67, 541, 541, 67)], ids=str)
def test_kernel_takes_odd_lengths(lengths: Shape) -> None:
    q, k, v, segments = _inputs((1, 16, *lengths), torch.float32)
    _assert_close(_run(q, k, v, segments), _exact(q, k, v, segments), LIMITS[torch.float32])


@needs_triton
@pytest.mark.parametrize("tiles", [SMALL, *CANDIDATES], ids=str)
def test_tiles_do_not_change_the_result(tiles: Tiles) -> None:
    q, k, v, segments = _inputs((1, 40, 67, 3, 48, 130, 16, 129), torch.float64, is_biased=True)
    _assert_close(_run(q, k, v, segments, tiles), _exact(q, k, v, segments), LIMITS[torch.float64])


@needs_triton
def test_keys_that_a_bias_shuts_out_are_not_seen() -> None:
    q, k, v, segments = _inputs((2, 16, 33, 70), torch.float64, is_biased=True)
    assert segments.key_bias is not None
    segments.key_bias[:40] = -torch.inf  # two whole blocks of the small tiles, and a part of the next
    expected = _exact(q, k, v, segments)
    _assert_close(_run(q, k, v, segments, SMALL), expected, LIMITS[torch.float64])
    v[:40] = 1e9
    _assert_close(_run(q, k, v, segments, SMALL), expected, LIMITS[torch.float64])


@needs_triton
def test_a_segment_without_keys_adds_up_to_nothing() -> None:
    q, k, v, segments = _inputs((2, 16, 5, 20, 7, 9), torch.float32)
    out, lse = _run(q, k, v, replace(segments, cu_k=(0, 0, 9)), SMALL)
    assert torch.equal(out[:5], torch.zeros_like(out[:5]))
    assert torch.equal(lse[:, :5], torch.full_like(lse[:, :5], -torch.inf))


def _one_key_more(table: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value + (place % 4 == 3) for place, value in enumerate(table))


def _one_key_less(table: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value - (place % 4 == 3) for place, value in enumerate(table))


def _one_query_more(table: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value + (place % 4 == 1) for place, value in enumerate(table))


def _one_block_less(table: tuple[int, ...]) -> tuple[int, ...]:
    return table[:-4]


def _keys_of_the_first_segment(table: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value for first in range(0, len(table), 4) for value in (*table[first : first + 2], *table[2:4]))


TABLE_MUTANTS = (_one_key_more, _one_key_less, _one_query_more, _one_block_less, _keys_of_the_first_segment)


@needs_triton
@pytest.mark.parametrize("mutant", TABLE_MUTANTS)
def test_comparison_notices_wrong_rows(
    mutant: Callable[[tuple[int, ...]], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, segments = _inputs((1, 16, 20, 33, 7, 18), torch.float32)
    q[-SPARE:] = 0  # so that a result for them is none of NaN
    monkeypatch.setattr(triton_attention, "block_table", lambda *bounds: mutant(block_table(*bounds)))
    with pytest.raises(AssertionError):
        _assert_close(_run(q, k, v, segments, SMALL), _exact(q, k, v, segments), LIMITS[torch.float32])


@needs_triton
@pytest.mark.parametrize("factor", [0.5, 1.001])
def test_comparison_notices_a_wrong_scale(factor: float) -> None:
    q, k, v, segments = _inputs((1, 16, 20, 33), torch.float32)
    wrong = replace(segments, scale=factor * segments.scale)
    with pytest.raises(AssertionError):
        _assert_close(_run(q, k, v, wrong, SMALL), _exact(q, k, v, segments), LIMITS[torch.float32])


def test_block_table_covers_each_query_once_and_begins_with_most_keys() -> None:
    table = block_table((0, 5, 70, 71), (0, 3, 4, 9), 32)
    entries = [table[first : first + 4] for first in range(0, len(table), 4)]
    assert entries == [(70, 71, 4, 9), (0, 5, 0, 3), (5, 70, 3, 4), (37, 70, 3, 4), (69, 70, 3, 4)]


def test_default_tiles_follow_the_generation() -> None:
    assert default_tiles(128, 2, 89) == default_tiles(128, 2, 80)
    assert default_tiles(128, 2, 90) == CANDIDATES[0]
    assert default_tiles(128, 2, 120) == default_tiles(128, 2, 100)
    assert default_tiles(256, 2, 90) != default_tiles(128, 2, 90)
    assert default_tiles(128, 4, 90).queries == 32


def test_tiles_that_were_measured_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"queries": 64, "keys": 64, "num_warps": 4, "num_stages": 3}
    tables = {"attention_tiles": {"128": measured}}
    monkeypatch.setattr(triton_attention, "tuned", lambda table, device: tables.get(table, {}))
    q = torch.empty(1, 1, 96, dtype=torch.bfloat16)
    assert tiles_for(q, is_biased=False) == Tiles(**measured)
    assert tiles_for(q, is_biased=True) == default_tiles(128, 2, 80)
    assert tiles_for(q.float(), is_biased=False) == default_tiles(128, 4, 80)
    assert tiles_for(q[:, :, :64], is_biased=False) == default_tiles(64, 2, 80)


def test_bounds_are_uploaded_once() -> None:
    device = torch.device("cpu")
    first = on_device((0, 3, 8), device)
    assert on_device((0, 3, 8), device) is first
    assert first.dtype == torch.int32
    assert first.tolist() == [0, 3, 8]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The packages that can be imported, nothing being tuned; a test adds to them."""
    found: set[str] = set()
    monkeypatch.setattr(
        library_attention,
        "why_not_importable",
        lambda module: None if module in found else f"{module} cannot be imported: No module named '{module}'",
    )
    monkeypatch.setattr(backends, "tuned", lambda table, device: {})
    backends.choose.cache_clear()
    yield found
    backends.choose.cache_clear()


def test_order_of_preference(packages: set[str]) -> None:
    assert backends.choose(DENSE, "auto") == "cudnn"
    backends.choose.cache_clear()
    packages.add("fa3_fwd_interface")
    assert backends.choose(DENSE, "auto") == "fa3"
    assert backends.choose(PACKED, "auto") == "fa3"
    assert backends.choose(replace(DENSE, dtype=torch.float16), "auto") == "cudnn"
    assert backends.choose(replace(DENSE, capability=100), "auto") == "cudnn"
    assert backends.choose(replace(DENSE, capability=80), "auto") == "flash"
    assert backends.choose(replace(DENSE, capability=75), "auto") == "math"
    assert backends.choose(replace(DENSE, dtype=torch.float64), "auto") == "math"
    assert backends.choose(replace(DENSE, dtype=torch.float32), "auto") == "efficient"
    assert backends.choose(replace(DENSE, head_dim=20), "auto") == ("triton" if backends.HAS_TRITON else "math")
    biased = "triton" if backends.HAS_TRITON else "efficient"
    assert backends.choose(replace(DENSE, has_bias=True), "auto") == biased
    assert backends.choose(replace(DENSE, device=torch.device("cpu"), capability=0), "auto") == "cpu"
    assert backends.choose(replace(DENSE, device=torch.device("meta"), capability=0), "auto") == "math"


def test_what_was_measured_goes_first(packages: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packages.add("flashinfer.prefill")
    measured = {"dense": ["fa3", "flashinfer"], "packed": ["flash"]}
    monkeypatch.setattr(backends, "tuned", lambda table, device: measured if table == "attention" else {})
    assert backends.choose(DENSE, "auto") == "flashinfer"
    assert backends.choose(PACKED, "auto") == "flash"
    assert backends.choose(replace(DENSE, dtype=torch.float64), "auto") == "math"


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "problem", "words"),
    [
        ("fa3", DENSE, "fa3_fwd_interface cannot be imported: No module named"),
        ("fa3", replace(DENSE, dtype=torch.float16), "takes bfloat16, not torch.float16"),
        ("fa3", replace(DENSE, capability=80), "needs compute capability 9.0, not 8.0"),
        ("fa3", replace(DENSE, capability=100), "has kernels for sm_90 only"),
        ("fa3", replace(DENSE, has_bias=True), "takes no bias of keys"),
        ("fa3", replace(DENSE, device=torch.device("cpu"), capability=0), "needs a CUDA device"),
        ("cudnn", replace(DENSE, cu_k=(0, 1)), "takes no segment of fewer than two keys"),
        ("flash", replace(DENSE, head_dim=20), "takes heads of a multiple of 8 up to 256, not 20"),
        ("triton", replace(DENSE, head_dim=320), "takes heads of up to 256, not 320"),
        ("flashinfer", replace(DENSE, head_dim=96), "takes heads of 64, 128 and 256, not 96"),
        ("xformers", DENSE, "xformers.ops.fmha cannot be imported"),
        ("cpu", DENSE, "needs tensors in host memory"),
    ],
)
def test_a_named_backend_that_cannot_do_it_is_an_error(name: str, problem: backends.Problem, words: str) -> None:
    if name == "triton" and not backends.HAS_TRITON:
        words = "needs the package triton"
    with pytest.raises(AttentionBackendError) as error:
        backends.choose(problem, name)
    assert error.value.message.startswith(f"attention '{name}' ")
    assert words in error.value.message
    assert error.value.param == "attention"


@pytest.mark.usefixtures("packages")
def test_a_named_backend_is_what_runs() -> None:
    for name in ("cudnn", "flash", "efficient", "math"):
        assert backends.choose(DENSE, name) == name


def test_a_module_that_breaks_at_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN2at4_ops")

    monkeypatch.setattr(library_attention.importlib, "import_module", broken)
    library_attention.why_not_importable.cache_clear()
    reason = library_attention.why_not_importable("fa3_fwd_interface")
    library_attention.why_not_importable.cache_clear()
    assert reason == "fa3_fwd_interface cannot be imported: undefined symbol: _ZN2at4_ops"


def test_names() -> None:
    assert NAMES == ("auto", "fa3", "cudnn", "flash", "efficient", "triton", "flashinfer", "xformers", "cpu", "math")
    assert {name for order in backends.PREFERENCE.values() for name in order} <= BACKENDS.keys()


def test_without_gpu_it_is_the_fused_attention_of_cpus() -> None:
    q, k, v, segments = _inputs((2, 16, 5, 20, 7, 9), torch.float32)
    assert backend_for(q, segments) == "cpu"
    out, lse = attend(q, k, v, segments)
    expected, expected_lse = _exact(q, k, v, segments)
    torch.testing.assert_close(out[:-SPARE].double(), expected[:-SPARE], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse[:, :-SPARE].double(), expected_lse[:, :-SPARE], rtol=0, atol=2e-6)


def test_plain_products_where_named() -> None:
    q, k, v, segments = _inputs((2, 16, 5, 20, 7, 9), torch.float64, is_biased=True)
    out, lse = attend(q, k, v, replace(segments, backend="math"))
    expected, expected_lse = _exact(q, k, v, segments)
    _assert_close((out[:-SPARE], lse[:, :-SPARE]), (expected[:-SPARE], expected_lse[:, :-SPARE]), 1e-12)


def test_a_start_checks_what_was_named() -> None:
    device = torch.device("cpu")
    for name in ("auto", "cpu", "math"):
        check_backend(name, device, torch.float32, 128)
    for name, words in (("cudnn", "attention 'cudnn' needs a CUDA device"), ("fa4", "must be one of auto, fa3")):
        with pytest.raises(AttentionBackendError, match=words):
            check_backend(name, device, torch.bfloat16, 128)


@pytest.mark.parametrize(("name", "words"), [("fa3", "needs a CUDA device"), ("fa4", "must be one of auto, fa3")])
def test_operator_refuses_what_it_cannot_do(name: str, words: str) -> None:
    q, k, v, segments = _inputs((1, 16, 5, 5), torch.float32)
    with pytest.raises(AttentionBackendError, match=words):
        attend(q, k, v, replace(segments, backend=name))


def test_obstacles_name_every_backend() -> None:
    q, _, _, segments = _inputs((1, 16, 5, 5), torch.float32)
    found = obstacles(q, segments)
    assert found.keys() == BACKENDS.keys()
    assert {name for name, obstacle in found.items() if obstacle is None} == {"cpu", "math"}


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_trace_sees_one_operator_with_its_cost() -> None:
    q, k, v, segments = _inputs((2, 16, 5, 20, 7, 9), torch.float32)
    with _Trace() as trace:
        attend(q, k, v, segments)
    assert trace.names == ["helios.attend.default"]
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, segments)
    assert counter.get_total_flops() == 4 * 2 * 16 * (5 * 7 + 20 * 9)


def test_schema_and_shapes_hold() -> None:
    operator: Any = ATTEND.operator
    arguments = tuple(ATTEND.inputs(ATTEND.odd[2], torch.float32))
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "run",
    [torch_attention.attend_cudnn, torch_attention.attend_flash, torch_attention.attend_efficient, kernels.attend],
)
@pytest.mark.parametrize("shape", [(2, 128, 541, 67), (2, 128, 67, 13, 541, 67)], ids=str)
def test_operators_of_torch_are_called_as_they_are_declared(
    run: Callable[..., tuple[Tensor, Tensor]], shape: Shape
) -> None:
    """On tensors without memory, for which PyTorch knows the shapes of all results."""
    cu_q, cu_k = bounds_of(shape)
    qkv = torch.empty(max(cu_q[-1], cu_k[-1]), 3, 2, 128, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv[: cu_q[-1], 0], qkv[: cu_k[-1], 1], qkv[: cu_k[-1], 2]
    out, lse = run(q, k, v, Segments(cu_q=cu_q, cu_k=cu_k, scale=0.1))
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, len(q)), torch.float32)
