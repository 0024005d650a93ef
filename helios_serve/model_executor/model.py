"""A loaded checkpoint: its transformer, VAE and text encoder on their device. Knows checkpoints and placement; knows
nothing of requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helios_serve.config import ModelConfig
from helios_serve.errors import CheckpointError
from helios_serve.model_executor.batch import SamplingRules
from helios_serve.model_executor.checkpoint import load_module, read_config, resolve_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.text_encoder import TextEncoder
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import WanVAE

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeliosModel:
    """The modules of one checkpoint, ready to run."""

    config: CheckpointConfig
    transformer: HeliosTransformer
    vae: WanVAE
    text_encoder: TextEncoder

    @property
    def rules(self) -> SamplingRules:
        return SamplingRules(scheduler=self.config.scheduler, guidance=self.config.guidance)


def load_model(config: ModelConfig) -> HeliosModel:
    """Reads a checkpoint from a directory or the hub.

    Raises: CheckpointError for whatever keeps it from being served.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("device cuda: PyTorch sees no CUDA device here; use cpu", param="device")
    path = resolve_checkpoint(config.model)
    checkpoint = read_config(path)
    device, dtype = torch.device(config.device), _DTYPES[config.dtype]
    return HeliosModel(
        config=checkpoint,
        transformer=load_module(lambda: HeliosTransformer(checkpoint.transformer), path / "transformer", device, dtype),
        vae=load_module(lambda: WanVAE(checkpoint.vae), path / "vae", device, torch.float32),
        text_encoder=TextEncoder.load(path, device, dtype),
    )
