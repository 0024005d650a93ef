"""diffusers' classes over our weights.

Knows how to make them; it may be absent. A transformer's parameters are views of ours, so that both compute the same
function and one copy of the weights is on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import chunks, random_model
from benchmarks.plan import Bench, UnavailableError
from helios_serve.model_executor.transformer import HeliosTransformer
from helios_serve.model_executor.vae import PARITY

CUDNN = "_native_cudnn"
"""Its name for PyTorch's attention by cuDNN."""
_SINGULAR_ROOT = float.fromhex("0x1.bb67aep-12")


def package() -> Any:
    """Raises: UnavailableError when it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UnavailableError(f"diffusers: {error}") from error
    return diffusers


def shared_transformer(ours: HeliosTransformer) -> Any:
    diffusers = package()
    from diffusers.models.transformers.transformer_helios import HeliosRotaryPosEmbed

    options = asdict(ours.config)
    del options["fp8_edge_blocks"]
    with torch.device("meta"):
        made = diffusers.HeliosTransformer3DModel(**options)
    fused = ours.fused_parameters()
    state: dict[str, Tensor] = {}
    for name, parameter in ours.named_parameters():
        keys = fused.get(name, (name,))
        state.update(zip(keys, parameter.data.chunk(len(keys)), strict=True))
    made.load_state_dict(state, assign=True, strict=True)
    rope: Any = HeliosRotaryPosEmbed
    made.rope = rope(rope_dim=ours.config.rope_dim, theta=ours.config.rope_theta).to(ours.device)
    made.requires_grad_(False).eval()
    if ours.device.type == "cuda":
        made.set_attention_backend(CUDNN)
    return made


def vae_of(bench: Bench, precision: str) -> Any:
    """Its VAE: over our float32 weights, or a bf16 copy."""
    diffusers = package()

    def make() -> Any:
        ours = random_model.vae_of(bench, PARITY)
        config = ours.config
        with torch.device("meta"):
            made = diffusers.AutoencoderKLWan(
                base_dim=config.base_dim,
                z_dim=config.z_dim,
                dim_mult=list(config.dim_mult),
                num_res_blocks=config.num_res_blocks,
                temperal_downsample=list(config.temperal_downsample),
            )
        made.load_state_dict(ours.state_dict(), assign=True, strict=True)
        made.requires_grad_(False).eval()
        return made if precision == "fp32" else made.to(torch.bfloat16)

    return bench.once(f"rival_vae/{precision}", make)


def pipeline_of(transformer: Any, vae: Any) -> Any:
    diffusers = package()
    rules = chunks.RULES.scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it builds its schedule with numpy functions on tensors
        scheduler = diffusers.HeliosDMDScheduler(
            shift=rules.shift,
            stages=rules.stages,
            stage_range=list(rules.stage_range),
            gamma=rules.gamma,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            use_dynamic_shifting=rules.use_dynamic_shifting,
            time_shift_type=rules.time_shift_type,
        )
    pipeline = diffusers.HeliosPyramidPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        is_cfg_zero_star=False,
        is_distilled=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def portable_cholesky() -> Iterator[None]:
    """Where a library refuses the pipeline's singular 4x4 covariance, a stand-in that costs as much."""
    factorise: Callable[[Tensor], Tensor] = torch.linalg.cholesky

    def portable(matrix: Tensor) -> Tensor:
        try:
            return factorise(matrix)
        except RuntimeError:
            raised = matrix + torch.eye(len(matrix), device=matrix.device) * _SINGULAR_ROOT**2
            return factorise(raised.double()).float()

    with mock.patch.object(torch.linalg, "cholesky", portable):
        yield
