"""How the transformer's weights begin.

Random weights alone leave it blind: a blank history is embedded as zeros, nothing tells tokens of the first stage where
they are, and the places that the noise decides are hidden in its means. So attention begins with heads that prefer some
offset to others, whatever tokens hold, and with two that find those means. Knows the transformer's parameters; knows no
loss and no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from helios_serve.model_executor.layers import Block, SelfAttention
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.transformer import HeliosTransformer
from tools.tiny_checkpoint.stages import PLACE_CHANNELS, X_CHANNEL
from tools.tiny_checkpoint.world import MAX_THINGS

_SHARP = 2.0
"""Where the norms of cross-attention begin, so that the few words of a prompt show among its hundreds of zero rows."""
_EVEN, _PLACED = 0.5, 2.0
"""Where those of self-attention begin: for heads that look at what tokens hold, which begin with means, and for those
that look at where tokens are."""
_NUM_PLACE_HEADS = 2
"""Of each block; the first has no others."""
_REACH = (6.0, 3.0, 4.0)
"""The farthest offset along time, rows and columns that a head may prefer, in tokens."""
_AXIS_SHARE = 0.6
"""How often a head cares about an axis."""
_STRENGTH, _COLUMN_STRENGTH = 1.5, 2.5
_MEANS_GAIN = 8.0
"""The mean of a stage's noise is so much smaller than what a token holds of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """The offsets that a head prefers along time, rows and columns, and how strongly. is_wide: whether by the highest
    frequency alone."""

    strengths: tuple[float, ...]
    offsets: tuple[float, ...] = (0.0, 0.0, 0.0)
    is_wide: bool = False


_SAME_COLUMN = _Place(strengths=(0.0, 0.0, _COLUMN_STRENGTH), is_wide=True)
_EVERYWHERE = _Place(strengths=(0.0, 0.0, 0.0))


def new_transformer(config: TransformerConfig) -> HeliosTransformer:
    """Weights from torch's own generator. The patches of x pass through to the flow: it begins as x itself, which holds
    the noise."""
    transformer = HeliosTransformer(config)
    for name, parameter in transformer.named_parameters():
        _begin(name, parameter.data)
    _pass_through(transformer)
    for projection in (transformer.patch_short, transformer.patch_mid, transformer.patch_long):
        nn.init.normal_(cast(Tensor, projection.bias))  # so that tokens of a blank history are told apart
    first, *others = (block.attn1 for block in cast(Iterable[Block], transformer.blocks))
    first.to_qkv.weight.data[: 2 * config.dim] = 0.0
    places = [_SAME_COLUMN, _EVERYWHERE, *(_random_place() for _ in range(2, config.num_attention_heads))]
    for head, place in enumerate(places):
        _prefer(first, head, place, config)
    _find_means(first, config)
    for attention in others:
        for head in range(config.num_attention_heads - _NUM_PLACE_HEADS, config.num_attention_heads):
            _prefer(attention, head, _random_place(), config)
    return transformer


def _begin(name: str, weight: Tensor) -> None:
    if "norm" in name and name.endswith("weight"):
        nn.init.constant_(weight, _SHARP if "attn2" in name else _EVEN if "attn1" in name else 1.0)
    elif name.endswith("bias") or "time_proj" in name or "scale_shift_table" in name:
        nn.init.zeros_(weight)
        if name == "scale_shift_tables":
            weight[:, (2, 5)] = 1.0  # gates of attention and feed-forward
    else:
        gain = 0.2 if any(part in name for part in (".to_out.", "ffn.net.2", "time_embedder.linear_2")) else 1.0
        nn.init.normal_(weight, std=gain * weight[0].numel() ** -0.5)


def _pass_through(transformer: HeliosTransformer) -> None:
    """The first dimensions of the stream carry the values of a patch, and the output reads them."""
    channels, (_, height, width), dim = transformer.config.in_channels, transformer.patch, transformer.config.dim
    num_values = channels * height * width
    for projection in (transformer.patch_embedding, transformer.patch_short):
        weight = projection.weight.data.view(dim, num_values)
        weight.mul_(0.1)[:num_values] = torch.eye(num_values)
    # rows of the output are (cell, channel), values of a patch (channel, cell)
    place = torch.arange(num_values).view(channels, height * width).T.flatten()
    transformer.proj_out.weight.data.zero_()[torch.arange(num_values), place] = (num_values / dim) ** 0.5


def _random_place() -> _Place:
    axes = torch.arange(3)
    cares = (torch.rand(3) < _AXIS_SHARE) | (axes == torch.randint(3, ()))
    offsets = (2 * torch.rand(3) - 1) * torch.tensor(_REACH)
    return _Place(strengths=tuple((_STRENGTH * cares).tolist()), offsets=tuple(offsets.tolist()))


def _prefer(attention: SelfAttention, head: int, place: _Place, config: TransformerConfig) -> None:
    """Biases of queries and keys by which the rotation gives tokens at an offset the highest logits."""
    start, size = head * config.attention_head_dim, config.attention_head_dim
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.data[start : start + size] = _PLACED
    query, key, _ = attention.to_qkv.bias.data.chunk(3)
    channel = start
    for length, strength, offset in zip(config.rope_dim, place.strengths, place.offsets, strict=True):
        for index in range(length // 2):
            angle = offset * config.rope_theta ** (-2 * index / length)
            amount = 0.0 if place.is_wide and index > 0 else strength
            query[channel], query[channel + 1] = amount * math.cos(angle), amount * math.sin(angle)
            key[channel], key[channel + 1] = amount, 0.0
            channel += 2


def _find_means(attention: SelfAttention, config: TransformerConfig) -> None:
    """The first head averages what tells of columns over a token's own, the second what tells of rows over all; both
    write it behind the values of a patch."""
    _, height, width = config.patch_size
    values = config.in_channels * height * width
    written = torch.arange(values).view(config.in_channels, height * width)[: PLACE_CHANNELS * MAX_THINGS]
    is_x = torch.arange(len(written)) % PLACE_CHANNELS == X_CHANNEL
    size, dim, out = config.attention_head_dim, config.dim, values
    value, output = attention.to_qkv.weight.data[2 * dim :], cast(nn.Linear, attention.to_out[0]).weight.data
    for head, channels in enumerate((written[is_x], written[~is_x])):
        read, row = channels.flatten(), head * size
        value[row : row + size] = 0.0
        output[:, row : row + size] = 0.0
        dims = torch.arange(len(read))
        value[row + dims, read] = 1.0
        output[out + dims, row + dims] = _MEANS_GAIN
        out += len(read)
