"""UMT5's encoder by few operations, on the weights of transformers' model.

For 24 layers the library makes about 1,400 launches, for which a GPU waits longer than it computes; here a layer takes
13, and positions are put into buckets once. Knows layers; knows no token, padding or prompt.
Shape letters: N tokens, P positions, D width, H heads of size K.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel

_ALIGNED = 16
"""Columns of a bias are a multiple of it: attention kernels would copy a bias of other strides."""


def is_supported(config: UMT5Config) -> bool:
    """Whether `encode_tokens` knows the activation."""
    return bool(config.is_gated_act) and config.dense_act_fn in ("gelu_new", "gelu_pytorch_tanh")


def encode_tokens(model: UMT5EncoderModel, embeds: Tensor) -> Tensor:
    """The last hidden states [N, D] of embedded tokens [N, D], none of which is padding.

    Args:
        model: with an activation that `is_supported`, all weights on the device and in the dtype of `embeds`.
    """
    stack: Any = model.encoder
    hidden, buckets = embeds.clone(), _buckets(model.config, embeds)
    for block in stack.block:
        attention, feed_forward = block.layer
        _attend(attention, hidden, buckets)
        _feed_forward(feed_forward, hidden)
    return _norm(hidden, stack.final_layer_norm)


def _attend(layer: Any, hidden: Tensor, buckets: Tensor) -> None:
    """Adds self-attention to hidden [N, D], in place; of buckets [N, P] the first N positions are looked at."""
    attention, num_tokens = layer.SelfAttention, len(hidden)
    normed = _norm(hidden, layer.layer_norm)
    q, k, v = (
        linear(normed).unflatten(-1, (attention.n_heads, -1)).transpose(0, 1)[None]  # (1, H, N, K)
        for linear in (attention.q, attention.k, attention.v)
    )
    by_head = attention.relative_attention_bias.weight.t()  # (H, buckets)
    bias = by_head.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)[..., :num_tokens]  # (H, N, N)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
    hidden.addmm_(out[0].transpose(0, 1).flatten(1), attention.o.weight.t())


def _feed_forward(layer: Any, hidden: Tensor) -> None:
    """Adds the gated layer to hidden [N, D], in place."""
    dense = layer.DenseReluDense
    normed = _norm(hidden, layer.layer_norm)
    gated = F.gelu(dense.wi_0(normed), approximate="tanh").mul_(dense.wi_1(normed))
    hidden.addmm_(gated, dense.wo.weight.t())


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _buckets(config: UMT5Config, embeds: Tensor) -> Tensor:
    """In which bucket token n has position p: [N, P] int64."""
    num_tokens = len(embeds)
    num_positions = -(-num_tokens // _ALIGNED) * _ALIGNED
    by_offset = _buckets_by_offset(
        config.relative_attention_num_buckets, config.relative_attention_max_distance, num_positions
    ).to(embeds.device)
    positions = torch.arange(num_positions, device=embeds.device)
    return by_offset[positions - positions[:num_tokens, None] + num_positions]


@lru_cache(maxsize=64)
def _buckets_by_offset(num_buckets: int, max_distance: int, reach: int) -> Tensor:
    """Buckets of the offsets -reach to reach, on the host.

    Half of them are for positions behind. Of each half, one half counts single tokens, the other grows with the
    logarithm of the distance up to `max_distance` (T5, Raffel et al. 2020, section 2.1).
    """
    offsets, half = torch.arange(-reach, reach + 1), num_buckets // 2
    num_single, distance = half // 2, offsets.abs()
    share = torch.log(distance.float() / num_single) / math.log(max_distance / num_single)
    far = (num_single + (share * (half - num_single)).long()).clamp(max=half - 1)
    bucket: Tensor = torch.where(distance < num_single, distance, far) + half * (offsets > 0)
    return bucket
