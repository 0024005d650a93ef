"""How the packages of attention are called, by stand-ins that have the signatures of the real ones.

Copied from fa3-fwd 0.0.3, flashinfer-python 0.7.2 and xformers 0.0.35; each computes by the definition and answers in
the layout and base of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_serve.kernels import reference, reference_fp8
from helios_serve.kernels.attention import Segments, library_attention
from helios_serve.kernels.attention.fp8_attention import attend_fa3_fp8, attend_math_fp8
from helios_serve.kernels.attention.library_attention import (
    attend_fa3,
    attend_flashinfer,
    attend_xformers,
    xformers_operator,
)
from helios_serve.kernels.fp8 import FP8

FA3_SCHEMA = (
    "fwd(Tensor q,Tensor k,Tensor v,Tensor(k_new!)? k_new = None,Tensor(v_new!)? v_new = None,Tensor? q_v = None,"
    "Tensor(out!)? out = None,Tensor? cu_seqlens_q = None,Tensor? cu_seqlens_k = None,Tensor? cu_seqlens_k_new = None,"
    "Tensor? seqused_q = None,Tensor? seqused_k = None,int? max_seqlen_q = None,int? max_seqlen_k = None,"
    "Tensor? page_table = None,Tensor? kv_batch_idx = None,Tensor? leftpad_k = None,Tensor? rotary_cos = None,"
    "Tensor? rotary_sin = None,Tensor? seqlens_rotary = None,Tensor? q_descale = None,Tensor? k_descale = None,"
    "Tensor? v_descale = None,float? softmax_scale = None,bool is_causal = False,int window_size_left = -1,"
    "int window_size_right = -1,int attention_chunk = 0,float softcap = 0.0,bool is_rotary_interleaved = False,"
    "Tensor? scheduler_metadata = None,int num_splits = 0,bool? pack_gqa = None,int sm_margin = 0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
"""Out of the package's library; its name there is `fa3_fwd::fwd`."""
DENSE = Segments(cu_q=(0, 67), cu_k=(0, 13), scale=0.3)
PACKED = Segments(cu_q=(0, 5, 18, 67), cu_k=(0, 31, 32, 73), scale=0.3)
HEADS, HEAD_DIM = 3, 64


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float) -> Any:
    parts = [
        reference.attend(q[q0:q1], k[k0:k1], v[k0:k1], scale)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher leaves out arguments at the end that have their defaults."""
    schema = torch.ops.fa3_fwd_stand_in.fwd.default._schema.arguments[3:]
    named = {one.name: one.default_value for one in schema}
    named.update(zip(named, given, strict=False))
    assert named.pop("num_splits") == 1, "0 lets a heuristic split the keys"
    cu_q, cu_k, scale = named.pop("cu_seqlens_q"), named.pop("cu_seqlens_k"), named.pop("softmax_scale")
    max_q, max_k = named.pop("max_seqlen_q"), named.pop("max_seqlen_k")
    scales = tuple(named.pop(f"{name}_descale") for name in "qkv")
    defaults = {one.name: one.default_value for one in schema}
    assert named == {name: defaults[name] for name in named}, "asked for more than plain attention"
    nothing = torch.empty(0)
    if q.dtype == FP8:
        return *_fa3_fp8(q, k, v, (cu_q, cu_k), scales, scale), nothing, nothing.clone()
    assert scales == (None, None, None)
    if cu_q is None:
        assert (cu_k, max_q, max_k) == (None, None, None)
        assert q.dim() == k.dim() == v.dim() == 4
        out, lse = _attend(q[0], k[0], v[0], (0, q.shape[1]), (0, k.shape[1]), scale)
        return out[None], lse[None], nothing, nothing.clone()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.dim() == k.dim() == v.dim() == 3
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    return *_attend(q, k, v, cu_q.tolist(), cu_k.tolist(), scale), nothing, nothing.clone()


def _fa3_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor | None, Tensor | None],
    scales: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """With a scale for each sequence and head; the result is bfloat16."""
    assert k.dtype == v.dtype == FP8
    is_dense = bounds[0] is None
    q, k, v = (x[0] for x in (q, k, v)) if is_dense else (q, k, v)
    cu_q, cu_k = ([0, len(x)] if bound is None else bound.tolist() for bound, x in zip(bounds, (q, k), strict=True))
    for each in scales:
        assert (each.shape, each.dtype) == ((len(cu_q) - 1, q.shape[1]), torch.float32)
    parts = []
    for index, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(cu_q), pairwise(cu_k), strict=True)):
        own = (scales[0][index], scales[1][index], scales[2][index])
        parts.append(reference_fp8.attend_fp8(q[q0:q1], k[k0:k1], v[k0:k1], own, scale))
    out, lse = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)
    return (out[None], lse[None]) if is_dense else (out, lse)


@pytest.fixture(scope="module")
def fa3() -> Iterator[Any]:
    library = torch.library.Library("fa3_fwd_stand_in", "DEF")
    library.define(FA3_SCHEMA)
    library.impl("fwd", _fa3_forward, "CPU")
    yield SimpleNamespace(fa3_fwd_cuda=torch.ops.fa3_fwd_stand_in)
    library._destroy()


class _Ragged:
    """flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper."""

    made: list[_Ragged]

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        assert (float_workspace_buffer.dtype, float_workspace_buffer.nbytes) == (torch.uint8, 128 << 20)
        assert (kv_layout, backend) == ("NHD", "auto")
        self.workspace = float_workspace_buffer
        self.num_runs = 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Tensor | None = None,
        o_indptr: Tensor | None = None,
        uniform_q_len: int | None = None,
    ) -> None:
        assert qo_indptr.device.type == kv_indptr.device.type == "cpu", "the package would wait for the device"
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert (num_qo_heads, num_kv_heads, head_dim_qk, causal) == (HEADS, HEADS, HEAD_DIM, False)
        assert sm_scale is not None
        self.cu_q, self.cu_k, self.scale = qo_indptr.tolist(), kv_indptr.tolist(), sm_scale
        self.dtypes = (q_data_type, kv_data_type)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        assert (lse_base, lse_layout) == ("log2", "NH")
        assert self.dtypes == (q.dtype, k.dtype)
        assert q.shape[0] == self.cu_q[-1]
        assert args == ()
        self.num_runs += 1
        found, natural = _attend(q, k, v, self.cu_q, self.cu_k, self.scale)
        return found, natural.T / math.log(2)


class _BlockDiagonalMask:
    """xformers.ops.fmha.BlockDiagonalMask."""

    num_made = 0

    def __init__(self, cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> None:
        self.cu_q, self.cu_k = cu_q, cu_k

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | None = None
    ) -> _BlockDiagonalMask:
        assert kv_seqlen is not None
        assert device == torch.device("cpu"), "where nothing is said, it is the first CUDA device"
        cls.num_made += 1
        sums = [(0, *torch.tensor(lengths).cumsum(0).tolist()) for lengths in (q_seqlen, kv_seqlen)]
        return cls(*sums)


def _fmha(*, has_fa3: bool) -> Any:
    """xformers.ops.fmha."""
    flash3 = SimpleNamespace(FwOp=SimpleNamespace(NAME="fa3F@pip_pkg", SUPPORTED_MIN_K=64))
    flash = SimpleNamespace(FwOp=SimpleNamespace(NAME="fa2F@2.5.7-pt", SUPPORTED_MIN_K=0))

    def partial(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: _BlockDiagonalMask | None = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert op is (flash3.FwOp if has_fa3 else flash.FwOp)
        assert query.dim() == key.dim() == value.dim() == 4
        assert scale is not None
        assert p == 0.0
        cu_q, cu_k = ((0, query.shape[1]), (0, key.shape[1])) if attn_bias is None else (attn_bias.cu_q, attn_bias.cu_k)
        out, lse = _attend(query[0], key[0], value[0], cu_q, cu_k, scale)
        return out[None], lse[None]

    return SimpleNamespace(
        flash3=flash3,
        flash=flash,
        dispatch=SimpleNamespace(fa3_available=lambda: has_fa3),
        BlockDiagonalMask=_BlockDiagonalMask,
        memory_efficient_attention_partial=partial,
    )


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, fa3: Any) -> Iterator[dict[str, Any]]:
    _Ragged.made = []
    _BlockDiagonalMask.num_made = 0
    found = {
        "fa3_fwd_interface": fa3,
        "flashinfer.prefill": SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=_Ragged),
        "xformers.ops.fmha": _fmha(has_fa3=True),
    }
    monkeypatch.setattr(library_attention, "_imported", found.__getitem__)
    caches = (
        library_attention._flashinfer_plan,
        library_attention._flashinfer_workspace,
        library_attention._xformers_mask,
    )
    for cached in caches:
        cached.cache_clear()
    yield found
    for cached in caches:
        cached.cache_clear()


def _inputs(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """As the fused projection leaves them."""
    torch.manual_seed(1)
    qkv = torch.randn(max(segments.cu_q[-1], segments.cu_k[-1]), 3, HEADS, HEAD_DIM)
    return qkv[: segments.cu_q[-1], 0], qkv[: segments.cu_k[-1], 1], qkv[: segments.cu_k[-1], 2]


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("run", [attend_fa3, attend_flashinfer, attend_xformers])
@pytest.mark.parametrize("segments", [DENSE, PACKED], ids=["dense", "packed"])
def test_package_is_called_as_it_is_declared(run: Any, segments: Segments) -> None:
    q, k, v = _inputs(segments)
    out, lse = run(q, k, v, segments)
    expected, expected_lse = _attend(q, k, v, segments.cu_q, segments.cu_k, segments.scale)
    assert torch.equal(out, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("segments", [DENSE, PACKED], ids=["dense", "packed"])
def test_fa3_is_given_e4m3_with_a_scale_for_each_sequence_and_head(segments: Segments) -> None:
    q, k, v = (x.bfloat16() for x in _inputs(segments))
    out, lse = attend_fa3_fp8(q, k, v, segments)
    expected, expected_lse = attend_math_fp8(q, k, v, segments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.usefixtures("modules")
def test_a_shape_is_planned_once() -> None:
    for _ in range(3):
        for segments in (DENSE, PACKED):
            attend_flashinfer(*_inputs(segments), segments)
            attend_xformers(*_inputs(segments), segments)
    assert [one.num_runs for one in _Ragged.made] == [3, 3]
    assert _Ragged.made[0].workspace is _Ragged.made[1].workspace
    assert _BlockDiagonalMask.num_made == 1  # one segment needs no mask


def test_xformers_names_what_runs(modules: dict[str, Any]) -> None:
    assert xformers_operator(128) == "fa3F@pip_pkg"
    assert xformers_operator(32) == "fa2F@2.5.7-pt"
    modules["xformers.ops.fmha"] = _fmha(has_fa3=False)
    assert xformers_operator(128) == "fa2F@2.5.7-pt"


@pytest.mark.usefixtures("modules")
def test_stand_in_refuses_a_logarithm_of_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _inputs(DENSE)
    monkeypatch.setattr(library_attention, "LN_2", 1.0)
    _, lse = attend_flashinfer(q, k, v, DENSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(lse, _attend(q, k, v, DENSE.cu_q, DENSE.cu_k, DENSE.scale)[1])
