"""Attention of a rank's own queries to the keys and values of all ranks, which go around between them.

Knows segments, blocks and log-sum-exps; knows nothing of heads elsewhere. While one block is attended to, the next is
on its way. Partial results are merged in float32 (float64 for float64 inputs). Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress, pairwise

import torch
from torch import Tensor

from helios_serve import kernels
from helios_serve.kernels import Segments
from helios_serve.kernels.merge_attention import merge_attention
from helios_serve.parallel.collectives import Axis


def ring_attend(q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Segments, ...], axis: Axis) -> Tensor:
    """q (Nq, H, Dh), k and v (Nk, H, Dh) on each rank -> (Nq, H, Dh) over the keys of all.

    Args:
        blocks: for each rank of the axis, this rank's queries against that rank's keys.
    """
    if axis.size == 1:
        return kernels.attend(q, k, v, blocks[0])[0]
    held = _block(k, v, max(segments.cu_k[-1] for segments in blocks))
    spare = torch.empty_like(held)
    total: tuple[Tensor, Tensor] | None = None
    for turn in range(axis.size):
        segments = blocks[(axis.rank - turn) % axis.size]
        is_last = turn == axis.size - 1
        transfer = None if is_last else axis.rotate(held, spare)
        keys, values = held[:, : segments.cu_k[-1]]
        part = _attend_where_any(q, keys, values, segments)
        total = part if total is None else merge_attention(*total, *part)
        if transfer is not None:
            transfer.wait()
            held, spare = spare, held
    assert total is not None
    return total[0].to(q.dtype)


def _block(k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Keys and values as they travel, (2, rows, H, Dh); rows behind the last mean nothing."""
    block = torch.empty((2, rows, *k.shape[1:]), dtype=k.dtype, device=k.device)
    block[0, : len(k)], block[1, : len(v)] = k, v
    return block


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    """What attention to no key at all gives."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf, dtype=dtype, device=q.device)


def _attend_where_any(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """`kernels.attend`, where a short sequence may have no queries or no keys on some ranks."""
    lengths_q = [stop - start for start, stop in pairwise(segments.cu_q)]
    lengths_k = [stop - start for start, stop in pairwise(segments.cu_k)]
    is_kept = [bool(a and b) for a, b in zip(lengths_q, lengths_k, strict=True)]
    if all(is_kept):
        return kernels.attend(q, k, v, segments)
    assert segments.key_bias is None
    out, lse = _empty(q)
    for index in compress(range(len(is_kept)), is_kept):
        (q0, q1), (k0, k1) = segments.cu_q[index : index + 2], segments.cu_k[index : index + 2]
        own = replace(segments, cu_q=(0, q1 - q0), cu_k=(0, k1 - k0))
        out[q0:q1], lse[:, q0:q1] = kernels.attend(q[q0:q1], k[k0:k1], v[k0:k1], own)
    return out, lse
