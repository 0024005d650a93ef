"""Models with random weights that are drawn on their device: sizes of the real ones, and no checkpoint.

Knows parameter names and how large their values must be, so that outputs are finite and depend on all inputs. Measures
nothing. The same seed gives the same weights on the same kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.plan import Bench, Sizes
from helios_serve.model_executor.history import NUM_HISTORY_FRAMES, History
from helios_serve.model_executor.model_config import TransformerConfig
from helios_serve.model_executor.transformer import HeliosTransformer, Shortcuts
from helios_serve.model_executor.vae import VaeConfig, VaeOptions, WanVAE
from helios_serve.types import LATENT_FRAMES_PER_CHUNK, MAX_TEXT_TOKENS

M = TypeVar("M", bound=nn.Module)
_Level = Callable[[str, tuple[int, ...]], tuple[float, float]]

_LINEAR_STD, _AT_WIDTH = 0.02, 5120
_TINY_VAE = VaeConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
FAST_VAE = VaeOptions.on(torch.device("cuda"))
EXACT_VAE = VaeOptions.on(torch.device("cuda"), "fp32")
"""What a server decodes with on a GPU, and what it does where fp32 is asked for."""


def transformer_of(bench: Bench) -> HeliosTransformer:
    """The benchmark's transformer, as a server on its device would run it; made once."""
    sizes = bench.sizes
    made: HeliosTransformer = bench.once(
        "transformer", lambda: random_transformer(sizes.transformer, sizes.dtype, bench.device)
    )
    return made


def vae_of(bench: Bench, options: VaeOptions) -> WanVAE:
    """The benchmark's VAE with float32 weights, its decoder prepared as `options` say; all of one seed, made once."""
    config = VaeConfig() if bench.sizes.is_full else _TINY_VAE
    key = f"vae/{options.precision}/{options.layout}"
    made: WanVAE = bench.once(key, lambda: random_vae(config, options, bench.device))
    return made


def random_transformer(
    config: TransformerConfig, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> HeliosTransformer:
    """Linear layers N(0, 0.02) at the 14B model's width, norms near 1, tables N(0, 1 / sqrt(D))."""
    is_fast = device.type != "cpu"
    shortcuts = Shortcuts(last_block_skips_history=is_fast, collapses_pad_tokens=is_fast)
    made = empty_transformer(config, dtype, shortcuts)
    return _drawn(made, lambda name, shape: _transformer_level(name, shape, config.dim), device, seed)


def empty_transformer(config: TransformerConfig, dtype: torch.dtype, shortcuts: Shortcuts) -> HeliosTransformer:
    """Without memory, its parameters in the precisions that a checkpoint is loaded in."""
    with torch.device("meta"):
        made = HeliosTransformer(config, shortcuts).to(dtype)
        for name, parameter in made.named_parameters():
            if made.keeps_float32(name):
                parameter.data = parameter.data.float()
    return made


def random_vae(config: VaeConfig, options: VaeOptions, device: torch.device, *, seed: int = 0) -> WanVAE:
    """Convolutions that keep the level of what they read, norms near 1."""
    with torch.device("meta"):
        made = WanVAE(config, options)
    _drawn(made, _vae_level, device, seed)
    made.prepare()
    return made


def with_layers(config: TransformerConfig, num_layers: int) -> TransformerConfig:
    """The same width, another depth."""
    return replace(config, num_layers=num_layers)


def random_latents(sizes: Sizes, stage: int, generator: torch.Generator) -> Tensor:
    """[C, 9, h, w] float32 on the generator's device, normal, of the size of a pyramid stage (2 is the finest)."""
    height, width = sizes.height >> (5 - stage), sizes.width >> (5 - stage)  # the VAE halves three times
    shape = (sizes.transformer.in_channels, LATENT_FRAMES_PER_CHUNK, height, width)
    return torch.randn(shape, generator=generator, device=generator.device)


def random_history(sizes: Sizes, generator: torch.Generator) -> History:
    """A history in the middle of a video."""
    shape = (sizes.transformer.in_channels, NUM_HISTORY_FRAMES, sizes.height // 8, sizes.width // 8)
    frames = torch.randn(shape, generator=generator, device=generator.device)
    return History(frames=frames, first=-frames[:, :1])


def random_prompt(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """[512, text_dim] float32 on the generator's device: a prompt without padding."""
    shape = (MAX_TEXT_TOKENS if sizes.is_full else 8, sizes.transformer.text_dim)
    return torch.randn(shape, generator=generator, device=generator.device)


def _drawn(module: M, level: _Level, device: torch.device, seed: int) -> M:
    """Gives memory to a module without any, and values to its parameters: `level` says (mean, standard deviation)."""
    module.to_empty(device=device)
    module.requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean, std = level(name, tuple(parameter.shape))
        parameter.normal_(mean, std, generator=generator)
    return module


def _transformer_level(name: str, shape: tuple[int, ...], width: int) -> tuple[float, float]:
    if "scale_shift_table" in name:
        return 0.0, width**-0.5
    if name.endswith("history_key_scale"):
        return -1.5, 1.0
    if "norm" in name and name.endswith("weight"):
        return 1.0, 0.1
    if name.startswith("patch_") and name.endswith("weight"):
        return 0.0, math.prod(shape[1:]) ** -0.5
    return 0.0, _LINEAR_STD * math.sqrt(_AT_WIDTH / width)


def _vae_level(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("gamma"):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.05
    gain = 0.6 if name == "decoder.conv_out.weight" else 1.6
    return 0.0, gain * math.prod(shape[1:]) ** -0.5
