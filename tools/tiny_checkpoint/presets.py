"""Sizes of the small checkpoint and of its training, by name. Knows numbers; knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeTraining:
    """How the VAE is trained: mostly on `batch` windows of `window` x `window` pixels, which show many scenes, in every
    fourth step on `pictures` whole ones; all have `frames` frames."""

    base_dim: int
    num_res_blocks: int
    steps: int
    batch: int
    window: int
    pictures: int
    frames: int
    learning_rate: float = 1.5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowTraining:
    """How the text encoder, the transformer and the VAE's decoder are trained.

    word_steps: the first steps, in which the text encoder alone learns what captions say.
    batch: examples of each pyramid stage in a step, coarse to fine. num_clips: encoded once, before the first step.
    two_share: of clips with two things. num_windows: of pictures that are decoded and looked at in a step.
    """

    num_heads: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    word_steps: int
    steps: int
    batch: tuple[int, int, int]
    num_clips: int
    two_share: float
    num_windows: int
    learning_rate: float = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Everything that is chosen by name."""

    vae: VaeTraining
    flow: FlowTraining


_CPU = Preset(
    vae=VaeTraining(base_dim=8, num_res_blocks=1, steps=3000, batch=6, window=32, pictures=1, frames=33),
    flow=FlowTraining(
        num_heads=6,
        num_layers=4,
        ffn_dim=512,
        text_dim=64,
        word_steps=1000,
        steps=6000,
        batch=(64, 32, 16),
        num_clips=1600,
        two_share=0.0,
        num_windows=6,
    ),
)
PRESETS: dict[str, Preset] = {
    "cpu": _CPU,
    "gpu": Preset(
        vae=replace(_CPU.vae, batch=64, pictures=8),
        flow=replace(_CPU.flow, batch=(128, 96, 64), num_clips=2500, num_windows=32),
    ),
}
"""The same sizes; on a GPU from more examples."""


def vae_json(training: VaeTraining, mean: list[float], std: list[float]) -> dict[str, Any]:
    """vae/config.json, with the latents' statistics by channel."""
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": training.base_dim,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "latents_mean": mean,
        "latents_std": std,
        "num_res_blocks": training.num_res_blocks,
        "temperal_downsample": [False, True, True],
        "z_dim": len(mean),
    }


def transformer_json(training: FlowTraining) -> dict[str, Any]:
    """transformer/config.json."""
    return {
        "_class_name": "HeliosTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": training.num_heads,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": training.text_dim,
        "freq_dim": 64,
        "ffn_dim": training.ffn_dim,
        "num_layers": training.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "added_kv_proj_dim": None,
        "rope_dim": [12, 10, 10],
        "rope_theta": 100.0,  # the grids are small: lower frequencies would tell no token from another
        "guidance_cross_attn": True,
        "zero_history_timestep": True,
        "has_multi_term_memory_patch": True,
        "is_amplify_history": False,
        "history_scale_mode": "per_head",
    }


def text_encoder_json(training: FlowTraining, vocab_size: int) -> dict[str, Any]:
    """text_encoder/config.json."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_model": training.text_dim,
        "d_kv": 16,
        "d_ff": 2 * training.text_dim,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": vocab_size,
    }
