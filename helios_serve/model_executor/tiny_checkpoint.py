"""Writes small random checkpoints in the official layout, for tests, demonstrations and the embedded default model.

Knows how to scale random weights so that prompt, history and timestep all show in the video. Reads no checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.checkpoint import VAE_FILE, checkpoint_shapes
from helios_serve.model_executor.model_config import (
    MODEL_INDEX_FILE,
    SCHEDULER_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    TransformerConfig,
)
from helios_serve.model_executor.recommendations import RECOMMENDATIONS_KEY
from helios_serve.model_executor.tiny_tokenizer import write_tokenizer
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import VaeConfig, WanVAE
from helios_serve.types import Variant

SIZES = [[128, 64], [64, 128], [128, 128]]
"""(width, height) in pixels, the default first."""

_TEXT_DIM = 32
_LAYOUT_VERSION = "0.42.1"

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "HeliosTransformer3DModel",
    "_diffusers_version": _LAYOUT_VERSION,
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": _TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "added_kv_proj_dim": None,
    "rope_dim": [12, 10, 10],
    "rope_theta": 10000.0,
    "guidance_cross_attn": True,
    "zero_history_timestep": True,
    "has_multi_term_memory_patch": True,
    "is_amplify_history": False,
    "history_scale_mode": "per_head",
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": _LAYOUT_VERSION,
    "attn_scales": [],
    "base_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(VaeConfig().latents_mean),
    "latents_std": list(VaeConfig().latents_std),
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_model": _TEXT_DIM,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_UNIPC: dict[str, Any] = {
    "_class_name": "HeliosScheduler",
    "prediction_type": "flow_prediction",
    "scheduler_type": "unipc",
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
_ONE_STAGE: dict[str, Any] = {"stages": 1, "stage_range": [0, 1]}
_THREE_STAGES: dict[str, Any] = {"stages": 3, "stage_range": [0, 1 / 3, 2 / 3, 1]}
_SCHEDULERS: dict[Variant, dict[str, Any]] = {
    "base": _UNIPC | _ONE_STAGE,
    "mid": _UNIPC | _THREE_STAGES,
    "distilled": {
        "_class_name": "HeliosDMDScheduler",
        "prediction_type": "flow_prediction",
        "scheduler_type": "dmd",
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        **_THREE_STAGES,
    },
}
_PIPELINES: dict[Variant, dict[str, Any]] = {
    "base": {"_class_name": "HeliosPipeline"},
    "mid": {"_class_name": "HeliosPyramidPipeline", "is_cfg_zero_star": True, "is_distilled": False},
    "distilled": {"_class_name": "HeliosPyramidPipeline", "is_cfg_zero_star": False, "is_distilled": True},
}

_TRANSFORMER_GAINS = {
    "time_proj": 0.7,
    "text_embedder.linear_1": 3.0,
    "attn1.to_out": 1.2,
    "attn2.to_out": 0.5,
    "proj_out": 0.4,
}
"""Weights that do not map unit variance to unit variance, by a part of their key. Guidance and the chunks of a long
video multiply rounding errors; with these gains they stay below the limits of parity."""

Draw = Callable[[str, tuple[int, ...], torch.Generator], Tensor]


def write_tiny_checkpoint(variant: Variant, out: Path, *, seed: int = 0, amplify_history: bool = False) -> None:
    """Writes a complete checkpoint of a few megabytes into the directory `out`; equal seeds give equal bytes.

    `out` appears only when it is complete.

    Raises: CheckpointError if `out` is a file or holds files already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; give a new or an empty directory", param="out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / "checkpoint"
        _write_parts(made, variant, _TRANSFORMER | {"is_amplify_history": amplify_history}, seed)
        os.replace(made, out)


def _write_parts(out: Path, variant: Variant, transformer: dict[str, Any], seed: int) -> None:
    for folder in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (out / folder).mkdir(parents=True)
    _write_json(out / MODEL_INDEX_FILE, _model_index(variant))
    scheduler = {"_diffusers_version": _LAYOUT_VERSION, "gamma": 1 / 3, "num_train_timesteps": 1000, "shift": 1.0}
    _write_json(out / SCHEDULER_FILE, scheduler | _SCHEDULERS[variant])
    _write_json(out / TRANSFORMER_FILE, transformer)
    _write_json(out / VAE_FILE, _VAE)
    text_encoder = _TEXT_ENCODER | {"vocab_size": write_tokenizer(out / "tokenizer")}
    _write_json(out / TEXT_ENCODER_FILE, text_encoder)

    with torch.device("meta"):
        dit = HeliosTransformer(TransformerConfig.from_json(transformer))
        vae = WanVAE(VaeConfig.from_json(_VAE))
        umt5 = UMT5EncoderModel(UMT5Config.from_dict(text_encoder))
    generator = torch.Generator().manual_seed(seed)
    # amplified history keys are sharp by themselves
    draw_transformer = partial(_draw_transformer, self_attention=1.0 if transformer["is_amplify_history"] else 1.7)
    _write_weights(out / "transformer" / "diffusion_pytorch_model.safetensors", dit, draw_transformer, generator)
    _write_weights(out / "vae" / "diffusion_pytorch_model.safetensors", vae, _draw_vae, generator)
    _write_weights(out / "text_encoder" / "model.safetensors", umt5, _draw_text_encoder, generator)


def _model_index(variant: Variant) -> dict[str, Any]:
    return _PIPELINES[variant] | {
        "_diffusers_version": _LAYOUT_VERSION,
        RECOMMENDATIONS_KEY: {"recommended_sizes": SIZES},
        "scheduler": ["diffusers", _SCHEDULERS[variant]["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _write_json(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, module: nn.Module, draw: Draw, generator: torch.Generator) -> None:
    shapes = checkpoint_shapes(module)
    save_file({key: draw(key, shapes[key], generator) for key in sorted(shapes)}, path, metadata={"format": "pt"})


def _draw_transformer(key: str, shape: tuple[int, ...], generator: torch.Generator, *, self_attention: float) -> Tensor:
    """`self_attention` is the level of its query and key norms, whose square sets how sharp it is."""
    if key.endswith("history_key_scale"):
        return _normal(shape, 1.0, generator) - 1.5
    if key.endswith("scale_shift_table"):
        return _normal(shape, 0.4, generator)
    if "norm" in key and key.endswith("weight"):
        # sharp attention: a prompt's few tokens must show among its padding, single history frames among all tokens
        level = 2.0 if "attn2.norm_" in key else self_attention if "attn1.norm_" in key else 1.0
        return level + _normal(shape, 0.1, generator)
    if key.endswith("bias"):
        return _normal(shape, 0.1, generator)
    return _fan_in(shape, next((gain for part, gain in _TRANSFORMER_GAINS.items() if part in key), 1.0), generator)


def _draw_vae(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if key.endswith("gamma"):
        return 1.0 + _normal(shape, 0.1, generator)
    if key == "quant_conv.bias":
        # the posterior is centred where the checkpoint's latent statistics say, with a standard deviation of e^-2
        centre = torch.tensor(_VAE["latents_mean"] + [-4.0] * _VAE["z_dim"])
        return centre + _normal(shape, 0.1, generator)
    if key.endswith("bias"):
        return _normal(shape, 0.05, generator)
    gain = 0.6 if key == "decoder.conv_out.weight" else 1.6
    return _fan_in(shape, gain, generator)


def _draw_text_encoder(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if "norm" in key:
        level = 0.5 if "final" in key else 1.0
        return level * (1.0 + _normal(shape, 0.1, generator))
    if key == "shared.weight":
        return _normal(shape, 1.0, generator)
    if "relative_attention_bias" in key:
        return _normal(shape, 0.5, generator)
    return _fan_in(shape, 0.6 if key.endswith((".q.weight", ".k.weight")) else 1.0, generator)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def _fan_in(shape: tuple[int, ...], gain: float, generator: torch.Generator) -> Tensor:
    """A weight that maps inputs of unit variance to outputs of standard deviation `gain`."""
    return _normal(shape, gain / math.sqrt(math.prod(shape[1:])), generator)
