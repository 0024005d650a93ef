"""The transformer's forward for training: a batch of equal sequences, differentiable, on `HeliosTransformer`'s own
parameters, whose own forward computes packed sequences without gradients. A test holds both to the same flow.

Knows tensors and the transformer's parts; knows nothing of noise, losses or captions.
Shape letters: B sequences, H history tokens, M current tokens, N = H + M, D width, L text tokens, Dh head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helios_serve.model_executor.history import History
from helios_serve.model_executor.layers import Block, Modulation, RMSNorm, sinusoidal_embedding
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.types import HISTORY_FRAMES, MAX_TEXT_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Prompt embeddings [B, L, text_dim], zero behind each prompt, and what is added to the logits of each row [B, L]:
    0 for a prompt's own, the logarithm of how many it stands for at the first zero row, -inf behind it."""

    embeds: Tensor
    bias: Tensor

    @classmethod
    def of(cls, hidden: Tensor, lengths: Tensor) -> TextBatch:
        """From the encoder's output [B, L, text_dim], of which `lengths` [B] rows count."""
        padded = F.pad(hidden, (0, 0, 0, 1))
        place, lengths = torch.arange(padded.shape[1], device=hidden.device), lengths[:, None]
        zeros = torch.where(place == lengths, (MAX_TEXT_TOKENS - lengths).log(), -math.inf)
        is_real = place < lengths
        return cls(embeds=padded * is_real[..., None], bias=torch.where(is_real, 0.0, zeros))


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What the sequences see: the last 19 latent frames [B, C, 19, h, w] and the pinned one [B, C, 1, h, w]."""

    frames: Tensor
    first: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The flow, in the shape of x, and the current tokens half way through the blocks, [B, M, D]."""

    flow: Tensor
    middle: Tensor


def batched_flow(
    model: HeliosTransformer, x: Tensor, timesteps: Tensor, past: Past, text: TextBatch, *, is_compiled: bool = False
) -> Prediction:
    """The flow of `x` [B, C, T, h, w] at `timesteps` [B].

    Args:
        is_compiled: fuses what is not a matrix product, once for each set of shapes; that takes a C++ compiler on the
            CPU, and minutes the first time.
    """
    rotary = torch.cat((_past_rotary(model, past), model.current_rotary(token_grid(model, x))))  # (N, 2, Dh/2)
    forward = _compiled_forward() if is_compiled else _forward
    flow, middle = forward(model, x, timesteps, past, text, rotary)
    return Prediction(flow=flow, middle=middle)


@cache
def _compiled_forward() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_forward, dynamic=False)


def _forward(
    model: HeliosTransformer, x: Tensor, timesteps: Tensor, past: Past, text: TextBatch, rotary: Tensor
) -> tuple[Tensor, Tensor]:
    history, current = _embed_past(model, past), _embedded(model.patch_embedding, x)
    embedder = model.condition_embedder
    waves = sinusoidal_embedding(F.pad(timesteps, (1, 0)), embedder.freq_dim)  # row 0 is the history's
    time = embedder.time_embedder
    hidden = time.linear_2(F.silu(time.linear_1(waves)))
    tables = embedder.time_proj(F.silu(hidden)).unflatten(-1, (6, -1)) + model.scale_shift_tables[:, None]
    words = embedder.text_embedder.linear_2(F.gelu(embedder.text_embedder.linear_1(text.embeds), approximate="tanh"))
    middle = current
    for index, (block, rows) in enumerate(zip(cast(Iterable[Block], model.blocks), tables, strict=True)):
        history, current = _block(block, history, current, Modulation.of(rows), rotary, (words, text.bias))
        if 2 * (index + 1) == len(tables):
            middle = current
    shift, scale = (model.norm_out.scale_shift_table + hidden[1:, None]).unbind(1)
    out = model.proj_out(_norm(current, block.eps) * (1 + scale[:, None]) + shift[:, None])
    patches: Tensor = out.unflatten(1, token_grid(model, x)).unflatten(-1, (*model.patch, -1))
    # (B, T, h, w, pt, ph, pw, C)
    return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape), middle


def _block(
    block: Block, history: Tensor, current: Tensor, m: Modulation, rotary: Tensor, words: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    normed = _modulated(history, current, m.shift, m.scale, block.eps)
    attended = _self_attention(block, normed, rotary)
    history, current = _gated(history, current, attended, m.gate)
    affine = block.norm2
    normed = F.layer_norm(current, current.shape[-1:], affine.weight, affine.bias, affine.eps)
    current = current + _cross_attention(block, normed, *words)
    fed = _feed_forward(block, _modulated(history, current, m.ff_shift, m.ff_scale, block.eps))
    return _gated(history, current, fed, m.ff_gate)


def _self_attention(block: Block, x: Tensor, rotary: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, D]."""
    attention = block.attn1
    q, k, v = attention.to_qkv(x).chunk(3, dim=-1)
    q, k = _rms_norm(q, attention.norm_q), _rms_norm(k, attention.norm_k)
    q, k = (_rotated(t.unflatten(-1, (attention.num_heads, -1)), rotary) for t in (q, k))
    v = v.unflatten(-1, (attention.num_heads, -1))
    out = _attended(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attention.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _cross_attention(block: Block, x: Tensor, words: Tensor, bias: Tensor) -> Tensor:
    """[B, M, D], words [B, L, D], bias [B, L] -> [B, M, D]."""
    attention = block.attn2
    q = attention.to_q(x)
    k, v = attention.to_kv(words).chunk(2, dim=-1)
    q, k = _rms_norm(q, attention.norm_q), _rms_norm(k, attention.norm_k)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = _attended(q, k, v, bias[:, None, None])
    return attention.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, heads, tokens, Dh], bias [B, 1, 1, L]. A processor's fused attention is slow with gradients in bfloat16."""
    if q.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, D], as it is not in FP8."""
    up, _, down = block.ffn.net
    return down(F.gelu(cast(nn.Linear, up.proj)(x), approximate="tanh"))  # type: ignore[no-any-return]


def _rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps)


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """Neighbouring channels of [B, N, heads, Dh], rotated."""
    cos, sin = rotary[:, None].unbind(2)  # (N, 1, Dh/2) each
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _modulated(history: Tensor, current: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The norm of all tokens [B, N, D]; row 0 of shift and scale [1 + B, D] is the history's."""
    old = _norm(history, eps) * (1 + scale[0]) + shift[0]
    return torch.cat((old, _norm(current, eps) * (1 + scale[1:, None]) + shift[1:, None]), dim=1)


def _gated(history: Tensor, current: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    old, new = y.split((history.shape[1], current.shape[1]), dim=1)
    return history + old * gate[0], current + new * gate[1:, None]


def _embed_past(model: HeliosTransformer, past: Past) -> Tensor:
    """Tokens of the history in the order long, mid, short: [B, H, D]."""
    long, mid, last = past.frames.split(HISTORY_FRAMES, dim=2)
    windows = (
        (model.patch_long, long, 4),
        (model.patch_mid, mid, 2),
        (model.patch_short, torch.cat((past.first, last), 2), 1),
    )
    tokens = []
    for projection, window, factor in windows:
        kernel = [factor * size for size in model.patch]
        pad = [size for length, p in zip(window.shape[:1:-1], kernel[::-1], strict=True) for size in (0, -length % p)]
        tokens.append(_embedded(projection, F.pad(window, pad, mode="replicate") if any(pad) else window))
    return torch.cat(tokens, dim=1)


def _embedded(projection: nn.Conv3d, x: Tensor) -> Tensor:
    """[B, C, T, h, w] -> [B, tokens, D], as one matrix product: a convolution's gradient takes longer."""
    frames, rows, columns = projection.kernel_size
    cells = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, frames))
    patches = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    return F.linear(patches, projection.weight.flatten(1), projection.bias)


def token_grid(model: HeliosTransformer, x: Tensor) -> tuple[int, int, int]:
    """Tokens of `x` [B, C, T, h, w] along time, rows and columns."""
    return x.shape[2], x.shape[3] // model.patch[1], x.shape[4] // model.patch[2]


def _past_rotary(model: HeliosTransformer, past: Past) -> Tensor:
    """[H, 2, Dh/2]: positions of history tokens depend on the latents' size alone."""
    return _history_rotary(model, past.frames.shape[1], past.frames.shape[3], past.frames.shape[4])


@lru_cache(maxsize=8)
def _history_rotary(model: HeliosTransformer, channels: int, height: int, width: int) -> Tensor:
    blank = torch.zeros(channels, sum(HISTORY_FRAMES), height, width)
    with torch.no_grad():
        return model.embed_history(History(frames=blank, first=None)).rotary
