"""Attention in e4m3: how far its rounding is from the exact result, that it keeps sequences and heads apart, and where
it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helios_serve.kernels import reference
from helios_serve.kernels.attention import (
    AUTO,
    BACKENDS,
    FP8_BACKENDS,
    AttentionBackendError,
    Segments,
    attend,
    backend_for,
    fp8_backend,
)
from helios_serve.kernels.attention.backends import Problem, choose
from helios_serve.kernels.attention.quantize_heads import BLOCK_TOKENS, quantize_heads
from helios_serve.kernels.fp8 import FP8

HEADS, HEAD_DIM = 4, 32
CU = (0, 150, 217)
SEGMENTS = Segments(cu_q=CU, cu_k=CU, scale=HEAD_DIM**-0.5, backend="math_fp8")
UNIT = 2.0**-4
"""Half the distance of neighbours, as a share of a number."""


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(CU[-1], HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    return q, k, v


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attend(q.double(), k.double(), v.double(), replace(SEGMENTS, backend="math"))


def test_rounded_heads_are_as_near_as_e4m3_allows() -> None:
    x = _inputs()[0]
    rounded, scale = quantize_heads(x, CU)
    assert (rounded.dtype, scale.shape) == (FP8, (2, HEADS))
    own = scale.repeat_interleave(torch.tensor([150, 67]), 0)[..., None]
    excess = (rounded.float() * own - x).abs() - UNIT * x.abs()
    assert (excess <= own * 2.0**-10).all()  # half of the smallest subnormal


def test_each_sequence_and_head_has_its_own_scale() -> None:
    x = _inputs()[0]
    rounded, scale = quantize_heads(x, CU)
    changed = x.clone()
    changed[150:, 2] *= 5.0
    other, other_scale = quantize_heads(changed, CU)
    is_other = other_scale != scale
    assert is_other.nonzero().tolist() == [[1, 2]]
    same = torch.ones(CU[-1], HEADS, dtype=torch.bool)
    same[150:, 2] = False
    assert torch.equal(other[same].view(torch.uint8), rounded[same].view(torch.uint8))


def test_blocks_of_tokens_do_not_matter() -> None:
    """A peak in any block counts for all of a sequence."""
    assert CU[1] > 2 * BLOCK_TOKENS
    for place in (0, 70, 149):
        x = _inputs()[0]
        x[place, 1, 3] = 100.0
        _, scale = quantize_heads(x, CU)
        assert scale[0, 1] == torch.tensor(100.0) * (1 / 448)


def test_amplified_history_keys_cost_the_others_nothing() -> None:
    """Their factor, up to 10, is applied before the rounding, whose steps follow the size of each number."""
    _, k, _ = _inputs()
    amplified = k.clone()
    amplified[:100] *= 10.0
    rounded, scale = quantize_heads(amplified, CU)
    error = (rounded[100:150].float() * scale[0][:, None] - k[100:150]).abs()
    assert (error <= UNIT * k[100:150].abs() + scale[0][:, None] * 2.0**-10).all()


def test_attention_is_near_the_exact_one() -> None:
    q, k, v = _inputs()
    exact, exact_lse = _exact(q, k, v)
    out, lse = attend(q, k, v, SEGMENTS)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    plain = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), replace(SEGMENTS, backend="cpu"))[0]
    assert _error(plain, exact) < 0.006
    assert 0.01 < _error(out, exact) < 0.06
    assert (lse - exact_lse).abs().max() < 0.1


def test_a_sequence_does_not_see_its_pack() -> None:
    q, k, v = _inputs()
    out, lse = attend(q, k, v, SEGMENTS)
    alone = Segments(cu_q=(0, 67), cu_k=(0, 67), scale=SEGMENTS.scale, backend="math_fp8")
    own_out, own_lse = attend(q[150:], k[150:], v[150:], alone)
    assert torch.equal(out[150:], own_out)
    assert torch.equal(lse[:, 150:], own_lse)


def test_queries_may_be_fewer_than_keys() -> None:
    q, k, v = _inputs()
    few = Segments(cu_q=(0, 20, 27), cu_k=CU, scale=SEGMENTS.scale, backend="math_fp8")
    queries = torch.cat((q[:20], q[150:157]))
    out, _ = attend(queries, k, v, few)
    whole, _ = _exact(q, k, v)
    assert _error(out, torch.cat((whole[:20], whole[150:157]))) < 0.06


def test_parts_of_the_keys_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As around a ring: log-sum-exps of rounded parts are good enough to join them."""
    from helios_serve.kernels import merge_attention

    q, k, v = (x[:150] for x in _inputs())
    halves = [Segments(cu_q=(0, 150), cu_k=(0, 75), scale=SEGMENTS.scale, backend="math_fp8")] * 2
    first, second = (attend(q, k[at : at + 75], v[at : at + 75], one) for at, one in zip((0, 75), halves, strict=True))
    merged, _ = merge_attention(*first, *second)
    exact, _ = reference.attend(q.double(), k.double(), v.double(), SEGMENTS.scale)
    assert _error(merged, exact) < 0.06


# Where it runs


def test_nothing_chooses_it() -> None:
    assert not {*FP8_BACKENDS} & {*BACKENDS}
    assert backend_for(_inputs()[0], replace(SEGMENTS, backend=AUTO)) == "cpu"
    assert [fp8_backend(torch.device(name)) for name in ("cpu", "cuda")] == ["math_fp8", "fa3_fp8"]


def _problem(**changes: object) -> Problem:
    hopper = {
        "device": torch.device("cuda"),
        "capability": 90,
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "cu_q": (0, 64),
        "cu_k": (0, 64),
        "has_bias": False,
    }
    return Problem(**{**hopper, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": torch.device("cpu"), "capability": 0}, "attention 'fa3_fp8' needs a CUDA device"),
        ({"capability": 80}, "needs compute capability 9.0, not 8.0"),
        ({"capability": 100}, "has kernels for sm_90 only"),
        ({"dtype": torch.float32}, "takes bfloat16, not torch.float32"),
        ({"head_dim": 72}, "takes heads of a multiple of 16, not 72"),
    ],
)
def test_what_it_cannot_do_is_said(changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from helios_serve.kernels.attention import library_attention

    monkeypatch.setattr(library_attention, "why_not_importable", lambda _: None)
    with pytest.raises(AttentionBackendError, match=message) as caught:
        choose.__wrapped__(_problem(**changes), "fa3_fp8")
    assert caught.value.param == "attention_precision"
    assert choose.__wrapped__(_problem(), "fa3_fp8") == "fa3_fp8"


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from helios_serve.kernels.attention import library_attention

    monkeypatch.setattr(library_attention, "why_not_importable", lambda name: f"{name} cannot be imported: absent")
    with pytest.raises(AttentionBackendError, match="fa3_fwd_interface cannot be imported"):
        choose.__wrapped__(_problem(), "fa3_fp8")
