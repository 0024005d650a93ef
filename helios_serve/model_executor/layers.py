"""The layers of the transformer. They know tensors and modulation rows; attention bounds arrive with the batch.

Parameter names equal those of the checkpoint, but for the projections that are fused along their output dimension.
Shape letters: N tokens, M current tokens, D width, H heads, Dh head size, R modulation rows, L text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helios_serve import kernels
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import PackedBatch

MAX_HISTORY_SCALE = 10.0
"""Upper end of the amplified history's key scale; the lower end is 1."""


class RMSNorm(nn.Module):
    """Holds the weight [D] of an RMSNorm over all heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return kernels.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Self-attention over history and current tokens, with rotary positions and optionally amplified history keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.history_key_scale: nn.Parameter | None = None
        if config.is_amplify_history:
            heads = self.num_heads if config.history_scale_mode == "per_head" else 1
            self.history_key_scale = nn.Parameter(torch.empty(heads))

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """[N, D] -> [N, D]."""
        qkv = self.to_qkv(x).view(len(x), 3, self.num_heads, -1)
        q, k, v = kernels.qk_norm_rope(
            qkv,
            self.norm_q.weight,
            self.norm_k.weight,
            batch.rotary,
            self.norm_q.eps,
            self._history_scale(),
            batch.layout.row,
        )
        out, _ = kernels.attend(q, k, v, batch.self_attention)
        return self.to_out[0](out.flatten(1))

    def _history_scale(self) -> Tensor | None:
        if self.history_key_scale is None:
            return None
        return 1.0 + torch.sigmoid(self.history_key_scale) * (MAX_HISTORY_SCALE - 1.0)


class CrossAttention(nn.Module):
    """Attention from current tokens to the prompt, whose keys and values are projected once and passed in."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.to_q = nn.Linear(config.dim, config.dim)
        self.to_kv = nn.Linear(config.dim, 2 * config.dim)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompt [L, D] -> normed keys and values, each [L, H, Dh]."""
        k, v = self.to_kv(text).chunk(2, dim=-1)
        return self._heads(self.norm_k(k)), self._heads(v)

    def forward(self, x: Tensor, text_kv: tuple[Tensor, Tensor], segments: kernels.Segments) -> Tensor:
        """[M, D] -> [M, D]."""
        q = self._heads(self.norm_q(self.to_q(x)))
        out, _ = kernels.attend(q, *text_kv, segments)
        return self.to_out[0](out.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class FeedForward(nn.Module):
    """Linear, GELU(tanh), Linear; the module list keeps the checkpoint's parameter names."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GeluUp(dim, inner_dim), nn.Identity(), nn.Linear(inner_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        up, _, down = self.net
        return down(up(x))


class _GeluUp(nn.Module):
    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.gelu_tanh(self.proj(x))


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, float32 inside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Modulated self-attention, cross-attention of the current tokens, modulated feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = AffineNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, x: Tensor, modulation: Tensor, text_kv: tuple[Tensor, Tensor], batch: PackedBatch) -> Tensor:
        """x [N, D], modulation [R, 6, D] -> [N, D]."""
        rows = self.scale_shift_table + modulation.to(self.scale_shift_table.dtype)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = rows.unbind(1)  # (R, D) each
        row, current_index = batch.layout.row, batch.layout.current_index

        attended = self.attn1(kernels.layer_norm_modulate(x, shift, scale, row, self.eps), batch)
        x = kernels.gated_residual(x, attended, gate, row)

        current = x[current_index]
        current = current + self.attn2(self.norm2(current), text_kv, batch.cross_attention)
        x = x.index_copy(0, current_index, current)

        fed = self.ffn(kernels.layer_norm_modulate(x, ff_shift, ff_scale, row, self.eps))
        return kernels.gated_residual(x, fed, ff_gate, row)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEmbedding:
    """Embedded timesteps: `hidden` [R, D] for the output norm, `modulation` [R, 6, D] for the blocks."""

    hidden: Tensor
    modulation: Tensor


class ConditionEmbedder(nn.Module):
    """Embeds timesteps and prompt embeddings into the width of the transformer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _TwoLinears(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = _TwoLinears(config.text_dim, config.dim)

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        """Timesteps [R] float32 -> their embeddings in the transformer's dtype."""
        waves = sinusoidal_embedding(timesteps, self.freq_dim)
        first, second = self.time_embedder.linear_1, self.time_embedder.linear_2
        hidden = _row_by_row(second, nn.functional.silu(_row_by_row(first, waves.to(first.weight.dtype))))
        hidden = hidden.to(self.time_proj.weight.dtype)
        modulation = _row_by_row(self.time_proj, nn.functional.silu(hidden))
        return TimeEmbedding(hidden=hidden, modulation=modulation.unflatten(-1, (6, -1)))

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """[L, text_dim] -> [L, D]."""
        return self.text_embedder.linear_2(kernels.gelu_tanh(self.text_embedder.linear_1(prompt_embeds)))


class _TwoLinears(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.linear_2 = nn.Linear(dim_out, dim_out)


def _row_by_row(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer that treats each of a few rows [R, D] alone, as the reference does: libraries sum in another order
    for one row than for several, so that a timestep's embedding would depend on what else is in the pack."""
    return torch.cat([linear(row) for row in x.split(1)])


class OutputNorm(nn.Module):
    """The last norm, modulated by the timestep's hidden embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, hidden: Tensor, row: Tensor) -> Tensor:
        """x [M, D], hidden [R, D], row [M] -> [M, D]."""
        shift, scale = (self.scale_shift_table + hidden[:, None].to(self.scale_shift_table.dtype)).unbind(1)
        return kernels.layer_norm_modulate(x, shift, scale, row, self.eps)


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """cos and sin of each timestep at dim/2 frequencies from 1 down to 1/10000: [R] -> [R, dim] float32."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angle = timesteps[:, None].float() * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
