"""The plain kernels against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

from helios_serve import kernels
from helios_serve.kernels import reference

ROWS = (1, 67, 541)


def _rows(count: int, num_rows: int) -> torch.Tensor:
    return torch.randint(0, num_rows, (count,), dtype=torch.int32)


@pytest.mark.parametrize("count", ROWS)
def test_layer_norm_modulate(count: int) -> None:
    x, shift, scale = torch.randn(count, 40), torch.randn(3, 40), torch.randn(3, 40)
    row = _rows(count, 3)
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    expected = normed * (1 + scale.double()[row]) + shift.double()[row]
    torch.testing.assert_close(
        kernels.layer_norm_modulate(x, shift, scale, row, 1e-6).double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("count", ROWS)
def test_gated_residual(count: int) -> None:
    x, y, gate, row = torch.randn(count, 24), torch.randn(count, 24), torch.randn(4, 24), _rows(count, 4)
    expected = x.double() + y.double() * gate.double()[row]
    torch.testing.assert_close(kernels.gated_residual(x, y, gate, row).double(), expected, rtol=0, atol=1e-6)


def test_modulation_rounds_once_in_bfloat16() -> None:
    x, y = torch.randn(67, 32, dtype=torch.bfloat16), torch.randn(67, 32, dtype=torch.bfloat16)
    gate, row = torch.randn(2, 32), _rows(67, 2)
    expected = (x.float() + y.float() * gate[row]).bfloat16()
    assert torch.equal(kernels.gated_residual(x, y, gate, row), expected)


@pytest.mark.parametrize("heads", [1, 5, 40])
def test_qk_norm_rope_rotates_pairs_and_scales_history_keys(heads: int) -> None:
    count, dim = 67, 8
    qkv = torch.randn(count, 3, heads, dim)
    q_weight, k_weight = torch.rand(heads * dim), torch.rand(heads * dim)
    angle = torch.randn(count, dim // 2)
    rotary = torch.stack((angle.cos(), angle.sin()), dim=1)
    row, scale = _rows(count, 3), 1 + torch.rand(heads)
    q, k, v = reference.qk_norm_rope(qkv, q_weight, k_weight, rotary, 1e-6, scale, row)

    def expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.double().flatten(1)
        normed = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        pairs = torch.view_as_complex(normed.view(count, heads, dim // 2, 2))
        turned = pairs * torch.polar(torch.ones_like(angle.double()), angle.double())[:, None]
        return torch.view_as_real(turned).flatten(-2)

    torch.testing.assert_close(q.double(), expected(qkv[:, 0], q_weight), rtol=0, atol=1e-5)
    keys = expected(qkv[:, 1], k_weight)
    keys[row == 0] *= scale.double()[:, None]
    torch.testing.assert_close(k.double(), keys, rtol=0, atol=2e-5)
    assert torch.equal(v, qkv[:, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_attention_equals_each_segment_alone(dtype: torch.dtype) -> None:
    q_lengths, k_lengths = (1, 67, 13), (5, 67, 101)
    q = torch.randn(sum(q_lengths), 3, 16, dtype=dtype)
    k, v = torch.randn(2, sum(k_lengths), 3, 16, dtype=dtype)
    bias = torch.randn(sum(k_lengths), dtype=dtype)
    cu_q, cu_k = (0, 1, 68, 81), (0, 5, 72, 173)
    limit = 1e-12 if dtype == torch.float64 else 5e-6
    for key_bias in (None, bias):
        out, lse = kernels.attend(q, k, v, kernels.Segments(cu_q=cu_q, cu_k=cu_k, scale=0.3, key_bias=key_bias))
        for index in range(3):
            rows, keys = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
            alone_bias = None if key_bias is None else key_bias[keys].double()
            expected, expected_lse = reference.attend(
                q[rows].double(), k[keys].double(), v[keys].double(), 0.3, alone_bias
            )
            torch.testing.assert_close(out[rows].double(), expected, rtol=0, atol=limit)
            torch.testing.assert_close(lse[:, rows].double(), expected_lse, rtol=0, atol=limit)


def test_segments_know_their_longest() -> None:
    segments = kernels.Segments(cu_q=(0, 3, 10), cu_k=(0, 5, 6), scale=1.0)
    assert (segments.max_q, segments.max_k) == (7, 5)
