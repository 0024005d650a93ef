"""A checkpoint and its modules: transformer, VAE and text encoder, all or only those that a role needs.

Knows checkpoints and placement; knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helios_serve.config import STEP_CACHE_THRESHOLD, ModelConfig, Offload
from helios_serve.errors import CheckpointError
from helios_serve.kernels.attention import check_backend, fp8_backend
from helios_serve.model_executor.approximations import check_approximations
from helios_serve.model_executor.batch import SamplingRules
from helios_serve.model_executor.checkpoint import Load, load_module, read_config, resolve_checkpoint
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.random_weights import random_module
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.model_executor.vae import VaeOptions, VaePrecision, WanVAE

if TYPE_CHECKING:
    from helios_serve.model_executor.text_encoder import TextEncoder

_HOST = torch.device("cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose configuration was read, and where its modules are to run. `dtype` is not the VAE's; `offload`
    says which modules stay in host memory."""

    path: Path
    config: CheckpointConfig
    device: torch.device
    dtype: torch.dtype
    offload: Offload
    is_quantized_at_load: bool
    vae_precision: VaePrecision | None
    attention: str
    has_graphs: bool
    step_cache_threshold: float
    load: Load

    @property
    def rules(self) -> SamplingRules:
        return _rules(self.config, self.step_cache_threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeliosModel:
    """The modules of one checkpoint, ready to run."""

    config: CheckpointConfig
    transformer: HeliosTransformer
    vae: WanVAE
    text_encoder: TextEncoder
    step_cache_threshold: float = STEP_CACHE_THRESHOLD

    @property
    def rules(self) -> SamplingRules:
        return _rules(self.config, self.step_cache_threshold)


def _rules(config: CheckpointConfig, step_cache_threshold: float) -> SamplingRules:
    return SamplingRules(
        scheduler=config.scheduler, guidance=config.guidance, step_cache_threshold=step_cache_threshold
    )


def open_checkpoint(config: ModelConfig) -> Checkpoint:
    """Finds a checkpoint in a directory or on the hub and reads its configuration.

    Raises: CheckpointError for whatever keeps it from being served.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("device cuda: PyTorch sees no CUDA device here; use cpu", param="device")
    path = resolve_checkpoint(config.model, has_weights=config.weights == "checkpoint")
    found = read_config(path)
    check_approximations(config.approximations, found.scheduler.solver)
    device = torch.device(config.device)
    return Checkpoint(
        path=path,
        config=found,
        device=device,
        dtype=_DTYPES[config.dtype],
        offload=config.offload,
        is_quantized_at_load=config.quantize == "fp8",
        vae_precision=config.vae_precision,
        attention=config.attention if config.attention_precision is None else fp8_backend(device),
        has_graphs=config.cuda_graphs,
        step_cache_threshold=config.step_cache_threshold,
        load=random_module if config.weights == "random" else load_module,
    )


def load_transformer(checkpoint: Checkpoint) -> HeliosTransformer:
    """What the DiT role needs.

    Raises: CheckpointError for weights that do not fit; AttentionBackendError for an attention that cannot run here.
    """
    config, folder = checkpoint.config.transformer, checkpoint.path / "transformer"
    check_backend(checkpoint.attention, checkpoint.device, checkpoint.dtype, config.attention_head_dim)
    takes_shortcuts = checkpoint.device.type != "cpu"
    shortcuts = Shortcuts(last_block_skips_history=takes_shortcuts, collapses_pad_tokens=takes_shortcuts)
    is_offloaded = checkpoint.offload == "all"
    home = _HOST if is_offloaded else checkpoint.device
    make = partial(
        HeliosTransformer, config, shortcuts, attention=checkpoint.attention, has_graphs=checkpoint.has_graphs
    )
    transformer = checkpoint.load(make, folder, home, checkpoint.dtype)
    if checkpoint.is_quantized_at_load and config.fp8_edge_blocks is None:
        transformer.quantize()
    if is_offloaded:
        transformer.offload(checkpoint.device)
    return transformer


def load_vae(checkpoint: Checkpoint) -> WanVAE:
    """What the VAE role needs, and the encoder role beside the text encoder; what encodes is float32.

    Raises: CheckpointError for weights that do not fit.
    """
    config, folder = checkpoint.config.vae, checkpoint.path / "vae"
    options = VaeOptions.on(checkpoint.device, checkpoint.vae_precision)
    vae = checkpoint.load(lambda: WanVAE(config, options), folder, checkpoint.device, torch.float32)
    vae.prepare()
    return vae


def load_text_encoder(checkpoint: Checkpoint) -> TextEncoder:
    """What the encoder role needs beside the VAE.

    Raises: CheckpointError for weights or a tokenizer that do not fit.
    """
    # transformers takes over a second to import, and workers of the other roles start without it.
    from helios_serve.model_executor.text_encoder import TextEncoder

    is_offloaded = checkpoint.offload != "none"
    home = _HOST if is_offloaded else checkpoint.device
    text_encoder = TextEncoder.load(checkpoint.path, home, checkpoint.dtype, checkpoint.load)
    if is_offloaded:
        text_encoder.offload(checkpoint.device)
    return text_encoder


def load_model(config: ModelConfig) -> HeliosModel:
    """Everything, for one process with all roles.

    Raises: CheckpointError for whatever keeps it from being served.
    """
    checkpoint = open_checkpoint(config)
    return HeliosModel(
        config=checkpoint.config,
        transformer=load_transformer(checkpoint),
        vae=load_vae(checkpoint),
        text_encoder=load_text_encoder(checkpoint),
        step_cache_threshold=checkpoint.step_cache_threshold,
    )
