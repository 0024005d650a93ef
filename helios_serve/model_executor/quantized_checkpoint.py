"""Writes a checkpoint again with the transformer in FP8: half the bytes to store, to download and to load.

Knows the official layout; the only additions are `weight_scale` tensors and `fp8_edge_blocks` in the transformer's
configuration, which `load_transformer` reads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.checkpoint import COMPONENT_CLASSES, load_module, read_config, read_json
from helios_serve.model_executor.model_config import MODEL_INDEX_FILE, TRANSFORMER_FILE
from helios_serve.model_executor.quantize import NUM_EDGE_BLOCKS
from helios_serve.model_executor.transformer import HeliosTransformer

_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


def save_quantized(source: Path, target: Path, num_edge_blocks: int = NUM_EDGE_BLOCKS) -> None:
    """Quantises the transformer of the checkpoint in `source` and writes a whole checkpoint to `target`.

    Args:
        num_edge_blocks: blocks at either end that stay bfloat16, at least 1: the last one takes its weights apart.

    Raises: CheckpointError if `target` exists, `num_edge_blocks` is too small, or `source` cannot be read, is in FP8,
        or has too few blocks.
    """
    config = read_config(source).transformer
    if target.exists():
        raise CheckpointError(f"{target} exists; name a directory that does not")
    if num_edge_blocks < 1:
        raise CheckpointError(
            f"{num_edge_blocks} blocks at either end would stay as they are; at least 1 must, and by default "
            f"{NUM_EDGE_BLOCKS} do"
        )
    if config.fp8_edge_blocks is not None:
        raise CheckpointError(f"{source} is in FP8 already; quantise the checkpoint that it was made from")
    if config.num_layers <= 2 * num_edge_blocks:
        raise CheckpointError(
            f"{source} has {config.num_layers} blocks, of which {num_edge_blocks} at either end stay as they are; "
            "nothing would be quantised"
        )
    transformer = load_module(
        lambda: HeliosTransformer(config), source / "transformer", torch.device("cpu"), torch.bfloat16
    )
    transformer.quantize(num_edge_blocks)
    target.mkdir(parents=True)
    for folder in COMPONENT_CLASSES:
        if folder != "transformer":
            shutil.copytree(source / folder, target / folder)
    shutil.copyfile(source / MODEL_INDEX_FILE, target / MODEL_INDEX_FILE)
    (target / "transformer").mkdir()
    written = {**read_json(source / TRANSFORMER_FILE), "fp8_edge_blocks": num_edge_blocks}
    (target / TRANSFORMER_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(_checkpoint_state(transformer), target / "transformer", filename_pattern=_PATTERN)


def _checkpoint_state(transformer: HeliosTransformer) -> dict[str, Tensor]:
    """The parameters under the checkpoint's names, fused ones taken apart."""
    fused, state = transformer.fused_parameters(), {}
    for name, parameter in transformer.named_parameters():
        keys = fused.get(name, (name,))
        parts = parameter.detach().chunk(len(keys))
        # copies: tensors that share memory are not saved
        state.update({key: part.clone() for key, part in zip(keys, parts, strict=True)})
    return state
