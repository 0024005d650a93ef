"""Cross-attention in plain PyTorch: the definition that its kernel is compared with.

Knows tensors only. Shape letters: M queries, H heads, Dh head size, L keys of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def cross_attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layer: int,
    cu_q: Sequence[int],
    repeats: Sequence[int],
    scale: float,
    places: Tensor | None,
) -> Tensor:
    """Softmax attention of each segment of queries to a prompt of its own, whose last key stands for several.

    A softmax over r equal keys is one over a single such key with ln(r) added to its logit.

    Args:
        q: [M, H, Dh].
        keys, values: of each prompt [layers, L, H, Dh].
        layer: which of the layers.
        cu_q: running sum of the segments' lengths, from 0 to M.
        repeats: how many equal keys the last one of each prompt stands for, at least 1.
        scale: factor of the logits.
        places: not read here.

    Returns: [M, H, Dh] in the dtype of `q`.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for (start, stop), key, value, repeat in zip(pairwise(cu_q), keys, values, repeats, strict=True):
        logits = torch.einsum("qhd,khd->hqk", q[start:stop].to(wide), key[layer].to(wide)) * scale
        logits[:, :, -1] += math.log(repeat)
        out[start:stop] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[layer].to(wide))
    return out
