"""Which VAE the small checkpoint has: one that was trained in the work directory, or that of the shipped checkpoint.

Knows files and the state of the training; trains nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from helios_serve.config import EMBEDDED_MODEL
from helios_serve.model_executor.vae import WanVAE
from tools.tiny_checkpoint.presets import VaeTraining
from tools.tiny_checkpoint.train_vae import VAE_FILE, new_vae

FLOW_FILE = "flow.pt"
"""State of the transformer's training, in which the decoder is trained too."""
_KEPT_FILE = EMBEDDED_MODEL / "vae" / "diffusion_pytorch_model.safetensors"
_KEPT_CONFIG = EMBEDDED_MODEL / "vae" / "config.json"


def best_vae(training: VaeTraining, work: Path) -> WanVAE:
    """The averaged weights of the trainings in `work`, which may still be going on; the kept ones where there is none.

    Raises: RuntimeError for a kept VAE of another size.
    """
    vae = new_vae(training)
    if (work / FLOW_FILE).is_file():
        vae.load_state_dict(_averages(work / FLOW_FILE, "vae_average"))
    elif (work / VAE_FILE).is_file():
        vae.load_state_dict(_averages(work / VAE_FILE, "average"))
    else:
        vae.load_state_dict({name: value.float() for name, value in load_file(_KEPT_FILE).items()})
    return vae.eval()


def kept_statistics(work: Path) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of the kept VAE's latents by channel, [C] each; None where `work` has a new VAE."""
    if (work / VAE_FILE).is_file():
        return None
    config = json.loads(_KEPT_CONFIG.read_text(encoding="utf-8"))
    return torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])


def _averages(file: Path, part: str) -> dict[str, Tensor]:
    values: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["parts"][part]["values"]
    return values
