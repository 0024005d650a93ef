"""A transformer of three layers in float64, and sequences for it, for tests of what is kept from step to step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from helios_serve.model_executor.history import HistoryTokens
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.packing import TokenSequence, pack, unpack
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts

SMALL = TransformerConfig(
    num_attention_heads=4,
    attention_head_dim=12,
    rope_dim=(4, 4, 4),
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=8,
    ffn_dim=48,
    num_layers=3,
    is_amplify_history=True,
)
EXACT = 1e-12


def small_transformer(*, last_block_skips_history: bool) -> HeliosTransformer:
    generator = torch.Generator().manual_seed(1)
    shortcuts = Shortcuts(last_block_skips_history=last_block_skips_history)
    made = HeliosTransformer(SMALL, shortcuts).double().requires_grad_(False).eval()
    for name, parameter in made.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return made


def sequence(transformer: HeliosTransformer, seed: int, size: tuple[int, int, int, int], t: float) -> TokenSequence:
    """size: history tokens, then T, h, w of the latents."""
    generator = torch.Generator().manual_seed(seed)
    num_history, *shape = size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = (num_history, 2, SMALL.attention_head_dim // 2)
    return TokenSequence(
        history=HistoryTokens(tokens=draw(num_history, SMALL.dim), rotary=draw(*rows).float()),
        x=draw(SMALL.in_channels, *shape),
        rotary=transformer.current_rotary((shape[0], shape[1] // 2, shape[2] // 2)),
        timestep=t,
        text=transformer.project_text(draw(5, SMALL.text_dim)),
    )


def later(given: TokenSequence, seed: int) -> TokenSequence:
    """The same history at another step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(given.x.shape, generator=generator, dtype=given.x.dtype)
    return replace(given, x=x, timestep=given.timestep / 3)


def flows_of(transformer: HeliosTransformer, *sequences: TokenSequence) -> list[Tensor]:
    batch, text = pack(sequences, SMALL.patch_size)
    return unpack(transformer(batch, text), batch, SMALL.patch_size)


def assert_equal(ours: Tensor, right: Tensor) -> None:
    assert (ours - right).abs().max() <= EXACT * right.abs().max()
