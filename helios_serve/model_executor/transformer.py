"""The Helios transformer: one packed batch in, the flow of its current tokens out.

Knows no rank, no cache policy, no sampler and no request. Architecture: Helios technical report and
`HeliosTransformer3DModel`; parameters carry the checkpoint's names (fused projections: see `fused_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helios_serve import kernels
from helios_serve.kernels.attention import AUTO
from helios_serve.model_executor import rope
from helios_serve.model_executor.history import (
    FIRST_CURRENT_FRAME,
    FIRST_LONG_FRAME,
    FIRST_MID_FRAME,
    LAST_HISTORY_FRAME,
    History,
    HistoryTokens,
)
from helios_serve.model_executor.layers import Block, ConditionEmbedder, Modulation, OutputNorm, Stream
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.offload import LayerOffload
from helios_serve.model_executor.packing import PackedBatch, PackedText, TextKV, patchify
from helios_serve.model_executor.quantize import NUM_EDGE_BLOCKS
from helios_serve.model_executor.rope import Grid
from helios_serve.model_executor.step_cache import write_residuals
from helios_serve.parallel.shards import upload

_FLOAT32_PARTS = ("weight_scale", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "history_key_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """Ways to the same flow with less work: equal in real arithmetic, not in the order of sums.

    last_block_skips_history: nobody reads the history behind the last block, so it gives keys and values there and
    nothing else.
    collapses_pad_tokens: the zero rows behind a prompt make equal keys and values, so that one row stands for all.
    """

    last_block_skips_history: bool = False
    collapses_pad_tokens: bool = False


class HeliosTransformer(nn.Module):
    """Predicts the flow of all current tokens of a packed batch.

    Args:
        config: the checkpoint's transformer configuration.
        shortcuts: none by default, as guidance multiplies every difference in rounding.
        attention: the backend of self-attention, a name out of `kernels.attention.NAMES`; `check_backend` tells
            whether it can run.
        has_graphs: whether its forwards are to run by CUDA graphs; see `cuda_graph`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shortcuts: Shortcuts = Shortcuts(),
        *,
        attention: str = AUTO,
        has_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.shortcuts = shortcuts
        self.attention = attention
        self.has_graphs = has_graphs
        self._offload: LayerOffload[Block] | None = None
        self.patch: Grid = config.patch_size
        self.patch_embedding = self._patch_projection(1)
        self.patch_short = self._patch_projection(1)
        self.patch_mid = self._patch_projection(2)
        self.patch_long = self._patch_projection(4)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, is_fp8=config.is_fp8(index)) for index in range(config.num_layers))
        self.scale_shift_tables = nn.Parameter(torch.empty(config.num_layers, 6, config.dim))
        self.norm_out = OutputNorm(config)
        self.proj_out = nn.Linear(config.dim, config.out_channels * self.patch[0] * self.patch[1] * self.patch[2])

    def offload(self, device: torch.device) -> None:
        """Moves the blocks to host memory, from where they visit `device` one by one, and the rest to `device`."""
        for child in self.children():
            if child is not self.blocks:
                child.to(device)
        self.scale_shift_tables.data = self.scale_shift_tables.to(device)
        self._offload = LayerOffload([*cast(Iterable[Block], self.blocks)], device)

    def _each_block(self) -> Iterator[Block]:
        return iter(cast(Iterable[Block], self.blocks)) if self._offload is None else self._offload.each()

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.proj_out.weight.device

    def forward(self, batch: PackedBatch, text: PackedText) -> Tensor:
        """The flow of the M current tokens: [M, patch * C], channel innermost."""
        batch = batch.attended_by(self.attention)
        time = self.condition_embedder.embed_time(batch.timesteps)
        layers = [Modulation.of(rows) for rows in kernels.modulation_table(self.scale_shift_tables, time.modulation)]
        stream = Stream(x=self._embed(batch), layout=batch.layout, text=text)
        blocks = self._each_block()
        block, last = next(blocks), len(layers) - 1
        normed = block.enter(stream, layers[0])
        for index, (own, following) in enumerate(pairwise(layers)):
            attended = block.attn1(normed, batch, index)
            del normed  # here and below: while other work runs, each would take a place in memory
            fed = block.feed(stream, attended, index, own)
            del attended
            block = next(blocks)
            normed = block.follow(stream, fed, own.ff_gate, following)
            del fed
        if self.shortcuts.last_block_skips_history:
            assert isinstance(normed, Tensor), "blocks at either end are not in FP8"
            attended, stream = block.attn1.of_current(normed, batch, last), stream.of_current()
        else:
            attended = block.attn1(normed, batch, last)
        del normed
        fed = block.feed(stream, attended, last, layers[-1])
        shift, scale = self.norm_out(time.hidden)
        gate, row, eps = layers[-1].ff_gate, stream.layout.row, self.config.eps
        normed = kernels.gated_residual_norm(stream.x, fed, gate, row, shift, scale, eps)
        if any(batch.step_caches):
            added = stream.current(stream.x) - self.embed_current(batch.patches)
            write_residuals(batch.step_caches, batch.layout.cu_current, added)
        return self.proj_out(stream.current(normed))

    def _embed(self, batch: PackedBatch) -> Tensor:
        """[N, D], the residual stream before the first block."""
        current = self.embed_current(batch.patches)
        x = current.new_empty((batch.num_tokens, current.shape[-1]))
        x[batch.layout.history_index] = batch.history
        x[batch.layout.current_index] = current
        return x

    def embed_current(self, patches: Tensor) -> Tensor:
        """Current latents [M, C * patch] -> tokens [M, D]."""
        return _project_patches(self.patch_embedding, patches)

    def project_text(self, prompt_embeds: Tensor) -> TextKV:
        """Keys and values of one prompt for all layers.

        Args:
            prompt_embeds: [L, text_dim]; zero rows behind the prompt are attended like any other. To find them, where
                they are collapsed, is to wait for the device that holds it.
        """
        length = len(prompt_embeds)
        num_kept = min(num_real_rows(prompt_embeds) + 1, length) if self.shortcuts.collapses_pad_tokens else length
        hidden = self.condition_embedder.embed_text(prompt_embeds[:num_kept].to(self.device, self.dtype))
        layers = [block.attn2.project_text(hidden) for block in self._each_block()]
        return TextKV(
            keys=torch.stack([k for k, _ in layers]),
            values=torch.stack([v for _, v in layers]),
            repeats=length - num_kept + 1,
        )

    def embed_history(self, history: History) -> HistoryTokens:
        """The tokens of one chunk's history, the same for all of its steps."""
        long, mid, short = (window.to(self.device, self.dtype) for window in history.windows())
        grid = (1, short.shape[2] // self.patch[1], short.shape[3] // self.patch[2])
        dims, theta = self.config.rope_dim, self.config.rope_theta
        tokens = torch.cat(
            (
                self._embed_window(self.patch_long, long, 4),
                self._embed_window(self.patch_mid, mid, 2),
                self._embed_window(self.patch_short, short, 1),
            )
        )
        rotary = torch.cat(
            (
                rope.pooled_rotary_rows(FIRST_LONG_FRAME, (long.shape[1], *grid[1:]), 4, dims, theta),
                rope.pooled_rotary_rows(FIRST_MID_FRAME, (mid.shape[1], *grid[1:]), 2, dims, theta),
                rope.short_rotary_rows((0, LAST_HISTORY_FRAME), (2, *grid[1:]), dims, theta),
            )
        )
        return HistoryTokens(tokens=tokens, rotary=upload(rotary, self.device))

    def current_rotary(self, grid: Grid) -> Tensor:
        """Rotary rows of the current tokens on a patch grid (T, h, w): [T * h * w, 2, Dh/2] float32."""
        rows = rope.rotary_rows(FIRST_CURRENT_FRAME, grid, self.config.rope_dim, self.config.rope_theta)
        return upload(rows, self.device)

    def fused_parameters(self) -> Mapping[str, tuple[str, ...]]:
        """Our fused parameters and the checkpoint keys that are stacked along dimension 0 to make them."""
        layers = range(self.config.num_layers)
        fused = {"scale_shift_tables": tuple(f"blocks.{index}.scale_shift_table" for index in layers)}
        for index in layers:
            attn1, attn2 = f"blocks.{index}.attn1", f"blocks.{index}.attn2"
            scales = ("weight_scale",) if self.config.is_fp8(index) else ()
            for kind in ("weight", "bias", *scales):
                fused[f"{attn1}.to_qkv.{kind}"] = tuple(f"{attn1}.{name}.{kind}" for name in ("to_q", "to_k", "to_v"))
            for kind in ("weight", "bias"):
                fused[f"{attn2}.to_kv.{kind}"] = tuple(f"{attn2}.{name}.{kind}" for name in ("to_k", "to_v"))
        return fused

    def quantize(self, num_edge_blocks: int = NUM_EDGE_BLOCKS) -> None:
        """Rounds the linear layers of all blocks but `num_edge_blocks` at either end, at least 1, to FP8."""
        assert num_edge_blocks >= 1, "the last block takes its weights apart"
        self.config = replace(self.config, fp8_edge_blocks=num_edge_blocks)
        for index, block in enumerate(cast(Iterable[Block], self.blocks)):
            if self.config.is_fp8(index):
                block.quantize()

    def keeps_float32(self, name: str) -> bool:
        """Whether a parameter stays float32 under lower precisions, as in the reference."""
        return any(part in name for part in _FLOAT32_PARTS)

    def _patch_projection(self, factor: int) -> nn.Conv3d:
        kernel = tuple(factor * p for p in self.patch)
        return nn.Conv3d(self.config.in_channels, self.config.dim, kernel, stride=kernel)  # type: ignore[arg-type]

    def _embed_window(self, projection: nn.Conv3d, window: Tensor, factor: int) -> Tensor:
        """Patch tokens of a history window [C, T, h, w], replicate-padded at its ends to whole patches."""
        kernel = (factor * self.patch[0], factor * self.patch[1], factor * self.patch[2])
        pad = [size for length, p in zip(window.shape[:0:-1], kernel[::-1], strict=True) for size in (0, -length % p)]
        padded = F.pad(window[None], pad, mode="replicate")
        if padded.device.type == "cpu":  # oneDNN sums a long kernel in another order than a matrix product
            return projection(padded)[0].flatten(1).T
        return _project_patches(projection, patchify(padded[0], kernel))


def num_real_rows(prompt_embeds: Tensor) -> int:
    """How many rows [L, text_dim] are before the zero rows at the end; NaN is not zero."""
    is_real = prompt_embeds.ne(0).any(1)
    last = torch.arange(1, len(is_real) + 1, device=is_real.device) * is_real
    return int(last.max().item())


def _project_patches(projection: nn.Conv3d, patches: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, as one matrix product: [tokens, C * patch] -> [tokens, D]."""
    return F.linear(patches, projection.weight.flatten(1), projection.bias)
