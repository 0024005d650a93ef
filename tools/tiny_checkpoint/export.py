"""Writes what was trained as a checkpoint in the official layout: `python -m tools.tiny_checkpoint.export OUT`.

Knows files and names of a checkpoint; trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from helios_serve.model_executor.checkpoint import VAE_FILE
from helios_serve.model_executor.model_config import MODEL_INDEX_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE
from helios_serve.model_executor.recommendations import RECOMMENDATIONS_KEY
from helios_serve.model_executor.tiny_checkpoint import write_tiny_checkpoint
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import WanVAE
from tools.tiny_checkpoint.kept_vae import best_vae
from tools.tiny_checkpoint.latents import LATENTS_FILE, load_statistics
from tools.tiny_checkpoint.presets import PRESETS, Preset, text_encoder_json, transformer_json, vae_json
from tools.tiny_checkpoint.stages import NUM_STAGES
from tools.tiny_checkpoint.train_flow import FlowModel, usable_flow
from tools.tiny_checkpoint.vocabulary import write_vocabulary
from tools.tiny_checkpoint.world import HEIGHT, WIDTH

PROMPT = "a large red circle moving right fast on a blue background"
MAX_BYTES = 16 * 1024 * 1024


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Writes the small checkpoint.")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="where the training keeps its state")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="what was trained")
    told = parser.parse_args()
    write_trained_checkpoint(PRESETS[told.preset], told.work, told.out)
    size = sum(file.stat().st_size for file in told.out.rglob("*") if file.is_file())
    print(f"wrote {told.out}: {size / 1e6:.1f} MB")


def write_trained_checkpoint(preset: Preset, work: Path, out: Path) -> None:
    """Writes the averaged weights in bfloat16; whatever else a checkpoint has is that of a random one.

    Raises: CheckpointError if `out` exists; FileNotFoundError for what was not trained yet.
    """
    mean, std = load_statistics(work / LATENTS_FILE)
    vae, flow = best_vae(preset.vae, work), usable_flow(preset.flow, work)
    write_tiny_checkpoint("distilled", out)
    recommended = {
        "recommended_sizes": [[WIDTH, HEIGHT]],
        "default_steps": [1] * NUM_STAGES,
        "example_prompt": PROMPT,
    }
    _edit_json(out / MODEL_INDEX_FILE, {RECOMMENDATIONS_KEY: recommended})
    shutil.rmtree(out / "tokenizer")
    vocabulary_size = write_vocabulary(out / "tokenizer")
    _edit_json(out / VAE_FILE, vae_json(preset.vae, mean.tolist(), std.tolist()))
    _edit_json(out / TRANSFORMER_FILE, transformer_json(preset.flow))
    _edit_json(out / TEXT_ENCODER_FILE, text_encoder_json(preset.flow, vocabulary_size))
    _save(out / "vae" / "diffusion_pytorch_model.safetensors", vae_tensors(vae))
    _save(out / "transformer" / "diffusion_pytorch_model.safetensors", transformer_tensors(flow.transformer))
    _save(out / "text_encoder" / "model.safetensors", text_encoder_tensors(flow))


def transformer_tensors(transformer: HeliosTransformer) -> dict[str, Tensor]:
    """Its parameters under the checkpoint's names, the fused ones taken apart."""
    fused = transformer.fused_parameters()
    tensors: dict[str, Tensor] = {}
    for name, parameter in transformer.named_parameters():
        keys = fused.get(name, (name,))
        tensors.update(zip(keys, parameter.data.chunk(len(keys)), strict=True))
    return tensors


def vae_tensors(vae: WanVAE) -> dict[str, Tensor]:
    """Its parameters."""
    return {name: parameter.data for name, parameter in vae.named_parameters()}


def text_encoder_tensors(flow: FlowModel) -> dict[str, Tensor]:
    """Its parameters; every word has the embedding of the word whose meaning it shares."""
    tensors = {name: parameter.data for name, parameter in flow.text_encoder.named_parameters()}
    tensors["shared.weight"] = tensors["shared.weight"][list(flow.vocabulary.canonical)]
    return tensors


def _edit_json(path: Path, changes: Mapping[str, object]) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
