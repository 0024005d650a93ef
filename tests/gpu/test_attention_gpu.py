"""Every backend of attention that is installed, on the GPU that is there, against one table of shapes.

Errors are measured against float64 and compared with those of plain bfloat16 products. What a backend cannot do here
is skipped with its own words.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.attention import (
    BACKENDS,
    AttentionBackendError,
    Segments,
    attend,
    attention_scale,
    backend_for,
    obstacles,
)
from helios_serve.kernels.attention.segments import on_device
from helios_serve.kernels.attention.triton_attention import CANDIDATES, Tiles, launch_attend
from helios_serve.kernels.cases_attention import ATTEND, bounds_of
from helios_serve.kernels.merge_attention import merge_attention, merge_reference
from helios_serve.kernels.op_case import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to run kernels on"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels do not compile"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
DEVICE = torch.device("cuda", 0)
NAMES = tuple(name for name in BACKENDS if name not in ("cpu", "math"))
ODD = (
    *((3, 128, length, length) for length in (1, 67, 541)),
    (3, 128, 67, 541),
    (3, 128, 541, 67),
    (3, 128, 67, 541, 541, 67),
    (3, 128, 2, 67, 541, 541, 2, 130),
    (3, 128, 541, 2, 67, 300, 67, 541, 300, 2),
    (3, 64, 67, 541, 130, 131),
)
SHAPES = (*ODD, *ATTEND.served)
PROBED_HEADS = 2
"""Of a shape, the first and the last: float64 logits of all heads would not fit."""
LSE_LIMIT, ERROR_RATIO = 1e-3, 1.1


def _inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Segments]:
    torch.manual_seed(sum(shape))
    cu_q, cu_k = bounds_of(shape)
    with DEVICE:
        q, k, v = ATTEND.inputs(shape, dtype)[:3]
    return q, k, v, Segments(cu_q=cu_q, cu_k=cu_k, scale=attention_scale(shape[1]))


def _named(segments: Segments, name: str, q: Tensor, key_bias: Tensor | None = None) -> Segments:
    """Skips, where the backend cannot do it."""
    named = Segments(cu_q=segments.cu_q, cu_k=segments.cu_k, scale=segments.scale, key_bias=key_bias, backend=name)
    obstacle = obstacles(q, named)[name]
    if obstacle is not None:
        pytest.skip(f"{name} {obstacle}")
    return named


def _probed(x: Tensor) -> Tensor:
    return x[:, [0, -1]]


def _exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(pairwise(segments.cu_q), pairwise(segments.cu_k), strict=True):
        heads = [
            reference.attend(
                q[q0:q1, head, None].double(),
                k[k0:k1, head, None].double(),
                v[k0:k1, head, None].double(),
                segments.scale,
                None if segments.key_bias is None else segments.key_bias[k0:k1].double(),
            )
            for head in range(q.shape[1])
        ]
        outs.append(torch.cat([out for out, _ in heads], 1))
        lses.append(torch.cat([lse for _, lse in heads], 0))
    return torch.cat(outs), torch.cat(lses, 1)


def _plain(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Products in the dtype of the inputs, which rounds logits and weights."""
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(segments.cu_q), pairwise(segments.cu_k), strict=True):
        logits = q[q0:q1].transpose(0, 1) @ k[k0:k1].permute(1, 2, 0) * segments.scale
        parts.append((logits.softmax(-1) @ v[k0:k1].transpose(0, 1)).transpose(0, 1))
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _expected(shape: Shape) -> tuple[Tensor, Tensor, float]:
    """Of the probed heads: out, lse and the error of plain products."""
    q, k, v, segments = _inputs(shape)
    q, k, v = (_probed(x) for x in (q, k, v))
    out, lse = _exact(q, k, v, segments)
    return out, lse, _error(_plain(q, k, v, segments), out)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Root of the mean square."""
    return (actual.double() - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_backend_conforms(shape: Shape, name: str) -> None:
    q, k, v, segments = _inputs(shape)
    named = _named(segments, name, q)
    assert backend_for(q, named) == name
    out, lse = attend(q, k, v, named)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((q.shape[1], q.shape[0]), torch.float32)
    expected, expected_lse, plain_error = _expected(shape)
    assert (lse[[0, -1]].double() - expected_lse).abs().max().item() <= LSE_LIMIT
    assert _error(_probed(out), expected) <= ERROR_RATIO * plain_error + 1e-6
    again, lse_again = attend(q, k, v, named)
    assert torch.equal(again, out), "two runs differ"
    assert torch.equal(lse_again, lse), "two runs differ"


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_rows_behind_the_last_segment_change_nothing(name: str) -> None:
    q, k, v, segments = _inputs((3, 128, 67, 541, 541, 67))
    named = _named(segments, name, q)
    expected, expected_lse = attend(q, k, v, named)
    tails = [torch.cat((x, torch.full_like(x[:5], torch.nan))) for x in (q, k, v)]
    out, lse = attend(*tails, named)
    assert torch.equal(out[: len(q)], expected)
    assert torch.equal(lse[:, : len(q)], expected_lse)


@torch.inference_mode()
def test_triton_leaves_rows_behind_the_last_segment_as_they_are() -> None:
    q, k, v, segments = _inputs((3, 128, 67, 541, 541, 67))
    _named(segments, "triton", q)
    out = torch.full((len(q) + 5, *q.shape[1:]), torch.nan, dtype=q.dtype, device=DEVICE)
    lse = torch.full((q.shape[1], len(q) + 5), torch.nan, device=DEVICE)
    launch_attend(q, k, v, segments, out, lse)
    for result in (out, lse.T):
        assert not result[: len(q)].isnan().any()
        assert result[len(q) :].isnan().all()


@pytest.mark.parametrize("tiles", CANDIDATES, ids=str)
@torch.inference_mode()
def test_every_candidate_of_tiles_conforms(tiles: Tiles) -> None:
    shape = (3, 128, 541, 2, 67, 300, 67, 541, 300, 2)
    q, k, v, segments = _inputs(shape)
    _named(segments, "triton", q)
    if torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("the candidates are for sm_90 and later")
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((3, len(q)), dtype=torch.float32)
    launch_attend(q, k, v, segments, out, lse, tiles)
    expected, expected_lse, plain_error = _expected(shape)
    assert (lse[[0, -1]].double() - expected_lse).abs().max().item() <= LSE_LIMIT
    assert _error(_probed(out), expected) <= ERROR_RATIO * plain_error


@pytest.mark.parametrize("name", ["efficient", "triton"])
@torch.inference_mode()
def test_bias_of_keys(name: str) -> None:
    q, k, v, segments = _inputs((3, 128, 67, 541, 541, 67))
    bias = torch.randn(len(k), device=DEVICE).bfloat16().float()  # one backend takes it in the dtype of the queries
    named = _named(segments, name, q, bias)
    out, lse = attend(q, k, v, named)
    expected, expected_lse = _exact(q, k, v, named)
    assert (lse.double() - expected_lse).abs().max().item() <= LSE_LIMIT
    assert _error(out, expected) <= ERROR_RATIO * _error(_plain(q, k, v, segments), _exact(q, k, v, segments)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.inference_mode()
def test_triton_in_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v, segments = _inputs((3, 64, 67, 200, 130, 67), dtype)
    out, lse = attend(q, k, v, _named(segments, "triton", q))
    expected, expected_lse = _exact(q, k, v, segments)
    assert (lse.double() - expected_lse).abs().max().item() <= (1e-5 if dtype == torch.float32 else LSE_LIMIT)
    assert (out.double() - expected).abs().max().item() <= (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_known_shape_is_not_waited_for(name: str) -> None:
    q, k, v, segments = _inputs((3, 128, 67, 541, 541, 67))
    named = _named(segments, name, q)
    attend(q, k, v, named)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, named)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_bounds_of_a_new_shape_are_not_waited_for() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device((0, 3, 77777), DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["fa3", "cudnn", "flash", "triton"])
@torch.inference_mode()
def test_backend_can_be_captured(name: str) -> None:
    q, k, v, segments = _inputs((3, 128, 67, 541, 541, 67))
    named = _named(segments, name, q)
    expected, _ = attend(q, k, v, named)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(q, k, v, named)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@torch.inference_mode()
def test_the_order_of_preference_holds_on_this_device() -> None:
    q, _, _, segments = _inputs((3, 128, 67, 541, 541, 67))
    capability = torch.cuda.get_device_capability(DEVICE)
    can = {name for name, obstacle in obstacles(q, segments).items() if obstacle is None}
    wanted = ("fa3", "cudnn") if capability[0] == 9 else ("cudnn",) if capability[0] >= 10 else ("flash",)
    assert backend_for(q, segments) == next(name for name in wanted if name in can)


@torch.inference_mode()
def test_parts_of_the_keys_merge_to_the_whole() -> None:
    q, k, v, segments = _inputs((3, 128, 541, 541))
    expected, expected_lse = _exact(q, k, v, segments)
    parts = []
    for keys in torch.arange(len(k), device=DEVICE).tensor_split(4):
        part = Segments(cu_q=segments.cu_q, cu_k=(0, len(keys)), scale=segments.scale)
        parts.append(attend(q, k[keys], v[keys], part))
    out, lse = parts[0]
    for part_out, part_lse in parts[1:]:
        merged = merge_attention(out, lse, part_out, part_lse)
        for actual, wanted in zip(merged, merge_reference(out, lse, part_out, part_lse), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        out, lse = merged
    assert out.dtype == torch.float32
    assert (lse.double() - expected_lse).abs().max().item() <= LSE_LIMIT
    assert _error(out, expected) <= ERROR_RATIO * _error(_plain(q, k, v, segments), expected)


@pytest.mark.parametrize(
    "shape",
    [(3, 128, 541, 541), (3, 128, 67, 541, 541, 67), (8, 64, 130, 67, 541, 131), (3, 128, 540, 2940)],
    ids=str,
)
@torch.inference_mode()
def test_fp8_attention_rounds_as_it_says(shape: Shape) -> None:
    """As near to the exact result as its definition, which rounds step by step on the host, with a tenth to spare."""
    q, k, v, segments = _inputs(shape)
    named = replace(segments, backend="fa3_fp8")
    try:
        backend_for(q, named)
    except AttentionBackendError as error:
        pytest.skip(str(error))
    out, lse = attend(q, k, v, named)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_lse = _exact(q, k, v, segments)
    on_host = [x.cpu() for x in (q, k, v)]
    defined, defined_lse = attend(*on_host, replace(segments, backend="math_fp8"))
    assert _error(out, exact) <= ERROR_RATIO * _error(defined.to(DEVICE), exact)
    assert (lse - exact_lse).abs().max() <= ERROR_RATIO * (defined_lse.to(DEVICE) - exact_lse).abs().max()
    again, _ = attend(q, k, v, named)
    assert torch.equal(again, out), "two runs differ"
