"""Random weights in the place of a checkpoint's, drawn where they stay: for benchmarks and trials of a machine, which
ask for sizes and not for pictures.

Knows parameter names and how large their values must be, so that results are finite and depend on all inputs. The same
kind of device draws the same weights each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from helios_serve.errors import CheckpointError
from helios_serve.kernels import FP8
from helios_serve.model_executor.checkpoint import Loadable, put_parameters

M = TypeVar("M", bound=nn.Module)

_SEED = 0
_NORMS = ("gamma", "norm.weight", "norm1.weight", "norm2.weight", "norm_q.weight", "norm_k.weight")


def random_module(build: Callable[[], M], _folder: Path, device: torch.device, dtype: torch.dtype) -> M:
    """What `load_module` makes, without reading a file.

    Raises: CheckpointError for a configuration with FP8 weights, whose scales would mean nothing.
    """
    with torch.device("meta"):
        module = build()
    generator = torch.Generator(device).manual_seed(_SEED)
    drawn = {}
    for name, parameter in module.named_parameters():
        if parameter.dtype == FP8:
            raise CheckpointError("random weights are drawn in float; quantize them when they are loaded")
        is_wide = isinstance(module, Loadable) and module.keeps_float32(name)
        values = torch.empty(parameter.shape, device=device, dtype=torch.float32 if is_wide else dtype)
        mean, std = _level(name, tuple(parameter.shape))
        drawn[name] = nn.Parameter(values.normal_(mean, std, generator=generator), requires_grad=False)
    put_parameters(module, drawn)
    return module.eval().requires_grad_(False)


def _level(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep the level of activations from layer to layer."""
    if name.endswith(_NORMS):
        return 1.0, 0.1
    if name.endswith("history_key_scale"):
        return -1.5, 1.0
    if "scale_shift_table" in name:
        return 0.0, shape[-1] ** -0.5
    if name.endswith("shared.weight"):  # an embedding: rows are looked up, not summed
        return 0.0, 1.0
    if len(shape) == 1:
        return 0.0, 0.02
    is_convolution = len(shape) >= 4 and not name.startswith("patch_")
    # SiLU before a convolution takes a third of the level; pictures shall lie within the clamp.
    gain = 1.0 if not is_convolution else 0.6 if name == "decoder.conv_out.weight" else 1.6
    return 0.0, gain * math.prod(shape[1:]) ** -0.5
