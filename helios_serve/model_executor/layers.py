"""The layers of the transformer. They know tensors and modulation rows; attention bounds arrive with the batch.

Parameter names equal those of the checkpoint, but for the projections that are fused along their output dimension.
Shape letters: N tokens, M current tokens, D width, H heads, Dh head size, R modulation rows, L text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helios_serve import kernels
from helios_serve.kernels.cross_attention import PackedText, cross_attend
from helios_serve.kernels.quantize_rows import empty_rows
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import Layout, PackedBatch
from helios_serve.model_executor.quantize import Fp8Linear, QuantizedRows, make_linear, quantize_linears
from helios_serve.parallel.context_parallel import attend_sharded

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

    def __init__(self, config: TransformerConfig, *, is_fp8: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.to_qkv = make_linear(config.dim, 3 * config.dim, is_fp8=is_fp8)
        self.to_out = nn.ModuleList([make_linear(config.dim, config.dim, is_fp8=is_fp8)])
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.history_key_scale: nn.Parameter | None = None
        if config.is_amplify_history:
            heads = self.num_heads if config.history_scale_mode == "per_head" else 1
            self.history_key_scale = nn.Parameter(torch.empty(heads))

    def forward(self, normed: Tensor | QuantizedRows, batch: PackedBatch, layer: int) -> Tensor:
        """[N, D] -> [N, D]; `layer` is this block's place among kept keys and values."""
        qkv = self.to_qkv(normed).view(batch.num_tokens, 3, self.num_heads, -1)
        q, k, v = kernels.qk_norm_rope(
            qkv,
            self.norm_q.weight,
            self.norm_k.weight,
            batch.rotary,
            self.norm_q.eps,
            self._history_scale(),
            batch.layout.row,
        )
        k, v = batch.with_kept(k, v, layer)
        out = attend_sharded(q, k, v, batch.self_attention)
        del qkv, q, k, v  # the largest of all; the projection has room there
        return self.to_out[0](out.flatten(1))

    def of_current(self, normed: Tensor, batch: PackedBatch, layer: int) -> Tensor:
        """The same for the current tokens alone, which still see the whole history: [N, D] -> [M, D]."""
        dim, current = normed.shape[-1], batch.layout.current_index
        weight, bias = self.to_qkv.weight, self.to_qkv.bias
        q = F.linear(normed[current], weight[:dim], bias[:dim])
        k, v = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        eps, row = self.norm_q.eps, batch.layout.row
        q = kernels.norm_rope(self._heads(q), self.norm_q.weight, batch.rotary[current], eps)
        k = kernels.norm_rope(self._heads(k), self.norm_k.weight, batch.rotary, eps, self._history_scale(), row)
        k, v = batch.with_kept(k, self._heads(v), layer)
        out = attend_sharded(q, k, v, batch.current_attention)
        del q, k, v
        return self.to_out[0](out.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _history_scale(self) -> Tensor | None:
        if self.history_key_scale is None:
            return None
        return 1.0 + torch.sigmoid(self.history_key_scale) * (MAX_HISTORY_SCALE - 1.0)


class CrossAttention(nn.Module):
    """Attention from current tokens to the prompt, whose keys and values are projected once and passed in."""

    def __init__(self, config: TransformerConfig, *, is_fp8: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.to_q = make_linear(config.dim, config.dim, is_fp8=is_fp8)
        self.to_kv = nn.Linear(config.dim, 2 * config.dim)
        self.to_out = nn.ModuleList([make_linear(config.dim, config.dim, is_fp8=is_fp8)])
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompt [L, D] -> normed keys and values, each [L, H, Dh]."""
        k, v = self.to_kv(text).chunk(2, dim=-1)
        return self._heads(self.norm_k(k)), self._heads(v)

    def forward(self, x: Tensor | QuantizedRows, text: PackedText, layer: int) -> Tensor:
        """[M, D] -> [M, D]."""
        out = cross_attend(self._heads(self.norm_q(self.to_q(x))), text, layer)
        return self.to_out[0](out.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class FeedForward(nn.Module):
    """Linear, GELU(tanh), Linear; the module list keeps the checkpoint's parameter names."""

    def __init__(self, dim: int, inner_dim: int, *, is_fp8: bool) -> None:
        super().__init__()
        down = make_linear(inner_dim, dim, is_fp8=is_fp8)
        self.net = nn.ModuleList([_GeluUp(dim, inner_dim, is_fp8=is_fp8), nn.Identity(), down])

    def up(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        """The wide activations [N, F] of [N, D]."""
        activated: Tensor | QuantizedRows = self.net[0](x)
        return activated

    def down(self, activated: Tensor | QuantizedRows) -> Tensor:
        """[N, F] -> [N, D]."""
        out: Tensor = self.net[2](activated)
        return out


class _GeluUp(nn.Module):
    def __init__(self, dim: int, inner_dim: int, *, is_fp8: bool) -> None:
        super().__init__()
        self.proj = make_linear(dim, inner_dim, is_fp8=is_fp8)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        if isinstance(self.proj, Fp8Linear):
            return kernels.gelu_quantize_rows(self.proj(x))
        assert isinstance(x, Tensor)
        return kernels.linear_gelu(x, self.proj.weight, self.proj.bias)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The residual stream of a forward: x [N, D], changed in place; how its tokens stand; what they cross-attend to."""

    x: Tensor
    layout: Layout
    text: PackedText

    def of_current(self) -> Stream:
        """A copy of the current tokens [M, D] alone."""
        layout = self.layout.current_only
        assert layout is not None
        return replace(self, x=self.x[self.layout.current_index], layout=layout)

    def current(self, rows: Tensor) -> Tensor:
        """Those of `rows` [N, ...] that belong to current tokens: [M, ...]."""
        return rows if self.layout.current_only is None else rows[self.layout.current_index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Modulation:
    """How one layer modulates: six views [R, D] float32 into the table of all layers."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    ff_shift: Tensor
    ff_scale: Tensor
    ff_gate: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Modulation:
        """From [R, 6, D]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = rows.unbind(1)
        return cls(shift=shift, scale=scale, gate=gate, ff_shift=ff_shift, ff_scale=ff_scale, ff_gate=ff_gate)


class Block(nn.Module):
    """Modulated self-attention, cross-attention of the current tokens, modulated feed-forward.

    A norm is computed in the pass that writes its input, so `follow` adds what the block before has fed, and the caller
    adds what the last one does. Norms of a block in FP8 write quantised rows.
    """

    FP8_LINEARS = ("attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, config: TransformerConfig, *, is_fp8: bool = False) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config, is_fp8=is_fp8)
        self.attn2 = CrossAttention(config, is_fp8=is_fp8)
        self.norm2 = AffineNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim, is_fp8=is_fp8)

    def quantize(self) -> None:
        """Rounds the weights of the linear layers to FP8, but for those of the prompt, which are used once."""
        quantize_linears(self, self.FP8_LINEARS)

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.attn1.to_qkv, Fp8Linear)

    def enter(self, stream: Stream, modulation: Modulation) -> Tensor | QuantizedRows:
        """What `attn1` takes in the first block: the norm of the stream."""
        norm = kernels.layer_norm_modulate_fp8 if self.is_fp8 else kernels.layer_norm_modulate
        return norm(stream.x, modulation.shift, modulation.scale, stream.layout.row, self.eps)

    def follow(self, stream: Stream, fed: Tensor, gate: Tensor, modulation: Modulation) -> Tensor | QuantizedRows:
        """What `attn1` takes in the others: the norm of the stream, to which `fed` [N, D] of the block before is added
        in place with that block's `gate` [R, D]."""
        norm = kernels.gated_residual_norm_fp8 if self.is_fp8 else kernels.gated_residual_norm
        return norm(stream.x, fed, gate, stream.layout.row, modulation.shift, modulation.scale, self.eps)

    def feed(self, stream: Stream, attended: Tensor, layer: int, modulation: Modulation) -> Tensor:
        """All after self-attention but the last residual.

        Args:
            stream: x [N, D], changed in place: `attended` [N, D] and the cross-attention are added to it.
            layer: this block's place among the text's keys and values.

        Returns: the output of the feed-forward [N, D], without its gate.

        Tensors are let go as soon as nobody reads them: the widest ones decide how large a pack may be.
        """
        x, layout, shift, scale = stream.x, stream.layout, modulation.ff_shift, modulation.ff_scale
        gated = (x, attended, modulation.gate, layout.row, layout.current_place)
        tables = (shift, scale, self.norm2.weight, self.norm2.bias, self.eps)
        compact = x.new_empty((layout.num_current, x.shape[-1]))
        if self.is_fp8:
            quantized, current = empty_rows(x), empty_rows(compact)
            kernels.gated_residual_split_norm_fp8(*gated, *tables, *quantized, *current)
            del compact
            crossed = self.attn2(current, stream.text, layer)
            kernels.residual_scatter_norm_fp8(
                x, crossed, layout.current_index, shift, scale, layout.row, self.eps, *quantized
            )
            del current, crossed
            activated = self.ffn.up(quantized)
            del quantized
            return self.ffn.down(activated)
        normed = torch.empty_like(x)
        kernels.gated_residual_split_norm(*gated, *tables, normed, compact)
        crossed = self.attn2(compact, stream.text, layer)
        del compact
        kernels.residual_scatter_norm(x, crossed, layout.current_index, shift, scale, layout.row, self.eps, normed)
        del crossed
        activated = self.ffn.up(normed)
        del normed
        return self.ffn.down(activated)


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
    """Modulation of the last norm by the timestep's hidden embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [R, D] -> shift and scale, each [R, D] float32."""
        shift, scale = (self.scale_shift_table + hidden[:, None].to(self.scale_shift_table.dtype)).unbind(1)
        return shift, scale


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """cos and sin of each timestep at dim/2 frequencies from 1 down to 1/10000: [R] -> [R, dim] float32."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angle = timesteps[:, None].float() * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
