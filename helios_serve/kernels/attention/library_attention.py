"""Attention by packages that a deployment may install: FlashAttention 3, FlashInfer and xFormers.

Knows how each is called and what its log-sum-exp looks like; imports none before it is asked for. What a package
prepares for a packed shape is prepared once, not once per layer.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from helios_serve.kernels.attention.segments import NUM_SHAPES, Segments, on_device

FA3_MODULE = "fa3_fwd_interface"
FLASHINFER_MODULE = "flashinfer.prefill"
XFORMERS_MODULE = "xformers.ops.fmha"
NUM_PLANS = 16
"""Of FlashInfer that are kept: each holds 8 MiB on the device and as much pinned memory."""
LN_2 = math.log(2)
_WORKSPACE_BYTES = 128 << 20  # FlashInfer's recommendation


@cache
def why_not_importable(module: str) -> str | None:
    """None if it can be imported."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another PyTorch or CUDA
        return f"{module} cannot be imported: {error}"
    return None


def _imported(module: str) -> Any:
    return importlib.import_module(module)


def attend_fa3(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """FlashAttention 3 in bfloat16."""
    return run_fa3(q, k, v, segments, (None, None, None))


def run_fa3(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scales: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """FlashAttention 3 by the operator that `fa3_fwd_interface` registers; its own wrapper is there for training.

    Args:
        scales: of q, k and v in e4m3, each [sequences, H] float32; None in bfloat16.
    """
    forward = _imported(FA3_MODULE).fa3_fwd_cuda.fwd
    q_scale, k_scale, v_scale = scales
    if segments.is_dense:
        out, lse, *_ = forward(
            q[None],
            k[None],
            v[None],
            q_descale=q_scale,
            k_descale=k_scale,
            v_descale=v_scale,
            softmax_scale=segments.scale,
            num_splits=1,
        )
        return out[0], lse[0]  # (1, Nq, H, Dh) and (1, H, Nq)
    out, lse, *_ = forward(
        q,
        k,
        v,
        cu_seqlens_q=on_device(segments.cu_q, q.device),
        cu_seqlens_k=on_device(segments.cu_k, q.device),
        max_seqlen_q=segments.max_q,
        max_seqlen_k=segments.max_k,
        q_descale=q_scale,
        k_descale=k_scale,
        v_descale=v_scale,
        softmax_scale=segments.scale,
        num_splits=1,
    )
    return out, lse  # (Nq, H, Dh) and (H, Nq)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FlashInferShape:
    """What one plan of FlashInfer holds for."""

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    scale: float
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def attend_flashinfer(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """FlashInfer's ragged prefill, which picks FlashAttention 3 kernels on sm_90."""
    shape = _FlashInferShape(
        cu_q=segments.cu_q,
        cu_k=segments.cu_k,
        scale=segments.scale,
        num_heads=q.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype,
        device=q.device,
    )
    out, lse = _flashinfer_plan(shape).run(q, k, v, return_lse=True)
    return out, lse.T * LN_2  # (Nq, H) in base 2


@lru_cache(maxsize=NUM_PLANS)
def _flashinfer_plan(shape: _FlashInferShape) -> Any:
    """Bounds are host tensors: FlashInfer reads them there, and would wait for the device."""
    wrapper = _imported(FLASHINFER_MODULE).BatchPrefillWithRaggedKVCacheWrapper(
        _flashinfer_workspace(shape.device), kv_layout="NHD"
    )
    wrapper.plan(
        torch.tensor(shape.cu_q, dtype=torch.int32),
        torch.tensor(shape.cu_k, dtype=torch.int32),
        shape.num_heads,
        shape.num_heads,
        shape.head_dim,
        causal=False,
        sm_scale=shape.scale,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    return wrapper


@cache
def _flashinfer_workspace(device: torch.device) -> Tensor:
    """Shared by all plans, which run one after the other on a stream."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def attend_xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """xFormers, by the operator that `xformers_operator` names."""
    fmha = _imported(XFORMERS_MODULE)
    out, lse = fmha.memory_efficient_attention_partial(
        q[None],
        k[None],
        v[None],
        attn_bias=_xformers_mask(segments.cu_q, segments.cu_k, q.device),
        scale=segments.scale,
        op=_xformers_operator(q.shape[2]),
    )
    return out[0], lse[0]  # (1, Nq, H, Dh) and (1, H, Nq)


def xformers_operator(head_dim: int) -> str:
    """Its name for the kernels that run: FlashAttention 3 if a package brings it, else FlashAttention 2."""
    name: str = _xformers_operator(head_dim).NAME
    return name


def _xformers_operator(head_dim: int) -> Any:
    fmha = _imported(XFORMERS_MODULE)
    newest = fmha.flash3.FwOp
    return newest if fmha.dispatch.fa3_available() and head_dim >= newest.SUPPORTED_MIN_K else fmha.flash.FwOp


@lru_cache(maxsize=NUM_SHAPES)
def _xformers_mask(cu_q: tuple[int, ...], cu_k: tuple[int, ...], device: torch.device) -> Any:
    lengths_q, lengths_k = ([stop - start for start, stop in pairwise(cu)] for cu in (cu_q, cu_k))
    mask = _imported(XFORMERS_MODULE).BlockDiagonalMask
    return None if len(lengths_q) == 1 else mask.from_seqlens(lengths_q, lengths_k, device=device)
