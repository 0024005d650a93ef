"""A small transformer with the weights of diffusers' one, for comparing forwards."""

from __future__ import annotations

from functools import cache

import torch
from diffusers import HeliosTransformer3DModel

from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.transformer import HeliosTransformer

TEXT_DIM = 24


@cache
def transformer_pair(
    *, amplify_history: bool = False, scale_mode: str = "per_head"
) -> tuple[HeliosTransformer3DModel, HeliosTransformer]:
    """(diffusers', ours) with equal random weights that make every part of the model matter."""
    torch.manual_seed(0)
    theirs = HeliosTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=96,
        num_layers=3,
        rope_dim=(12, 10, 10),
        is_amplify_history=amplify_history,
        history_scale_mode=scale_mode,
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
            if parameter.ndim == 2:
                parameter.mul_(2 / parameter.shape[1] ** 0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    ours = HeliosTransformer(
        TransformerConfig.from_json({"_class_name": "HeliosTransformer3DModel", **theirs.config})
    ).eval()
    state, fused = theirs.state_dict(), ours.fused_parameters()
    ours.load_state_dict(
        {
            name: torch.cat([state[key] for key in fused[name]]) if name in fused else state[name]
            for name, _ in ours.named_parameters()
        }
    )
    return theirs, ours
