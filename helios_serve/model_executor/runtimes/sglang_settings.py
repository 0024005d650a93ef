"""Settings of an SGLang-Diffusion server as this package's own, and a clear refusal of those that would be ignored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch.distributed as dist
from sglang.multimodal_gen.runtime.platforms import current_platform
from sglang.multimodal_gen.runtime.server_args import ServerArgs

from helios_serve.config import Device, DType, GivenDegrees, ModelConfig, Offload
from helios_serve.errors import UnsupportedOperationError
from helios_serve.model_executor.model_config import CheckpointConfig
from helios_serve.model_executor.spread import degrees_for
from helios_serve.parallel.collectives import RankGroup
from helios_serve.parallel.mesh import SOLO, Mesh, build_mesh

_PRECISIONS: dict[str, tuple[DType, Literal["fp32", "bf16"]]] = {
    "fp32": ("float32", "fp32"),
    "float32": ("float32", "fp32"),
    "bf16": ("bfloat16", "bf16"),
    "bfloat16": ("bfloat16", "bf16"),
}
"""By SGLang's name: of the transformer and the text encoder, and of the VAE."""


def model_config(server_args: ServerArgs) -> ModelConfig:
    """Which checkpoint a server runs, and how.

    Raises: UnsupportedOperationError for a setting that would be ignored, with what to do.
    """
    _refuse_ignored(server_args)
    config, own = server_args.pipeline_config, server_args.component_precisions
    vae = own.get("vae", config.vae_precision if server_args.is_arg_explicitly_set("vae_precision") else None)
    return ModelConfig(
        model=server_args.model_path,
        device=_device(),
        dtype=_known_precision(own.get("transformer", config.dit_precision))[0],
        offload=_offload(server_args),
        quantize="none" if server_args.quantization is None else "fp8",
        vae_precision=None if vae is None else _known_precision(vae)[1],
    )


def mesh_of(server_args: ServerArgs, config: CheckpointConfig) -> Mesh:
    """How the ranks of a server share forwards: by the degrees that were given, and where none were, by those that send
    the fewest bytes. All ranks call this at the same time, in the process group that SGLang has made.

    Raises: UnsupportedOperationError for degrees that do not fit the ranks and heads, with what fits.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if num_ranks == 1:
        return SOLO
    given = GivenDegrees(
        cfg=server_args.cfg_parallel_degree if server_args.enable_cfg_parallel else None,
        ring=server_args.ring_degree if server_args.is_arg_explicitly_set("ring_degree") else None,
        ulysses=server_args.ulysses_degree if server_args.is_arg_explicitly_set("ulysses_degree") else None,
    )
    try:
        degrees = degrees_for(config, num_ranks, given)
    except ValueError as error:
        raise UnsupportedOperationError(str(error)) from error
    return build_mesh(RankGroup(rank=dist.get_rank(), size=num_ranks), degrees, "nccl" if _is_cuda() else "gloo")


def _known_precision(name: str) -> tuple[DType, Literal["fp32", "bf16"]]:
    if name not in _PRECISIONS:
        raise UnsupportedOperationError(f"precision {name}: Helios runs in bf16 or fp32")
    return _PRECISIONS[name]


def _is_cuda() -> bool:
    return bool(current_platform.is_cuda())


def _device() -> Device:
    return "cuda" if _is_cuda() else "cpu"


def _offload(server_args: ServerArgs) -> Offload:
    """What was asked for by name; what SGLang chooses by itself is for modules that it has loaded itself."""
    if _asks(server_args, "dit_cpu_offload", "dit_layerwise_offload"):
        return "all"
    return "text_encoder" if _asks(server_args, "text_encoder_cpu_offload") else "none"


def _asks(server_args: ServerArgs, *names: str) -> bool:
    return any(server_args.is_arg_explicitly_set(name) and vars(server_args)[name] for name in names)


def _refuse_ignored(server_args: ServerArgs) -> None:
    for name, is_set, why in _ignored(server_args):
        if is_set:
            raise UnsupportedOperationError(f"{name}: not with helios-serve, where {why}; leave it out", param=name)


def _ignored(server_args: ServerArgs) -> Iterable[tuple[str, Any, str]]:
    """Flags, whether they are set, and what is done instead."""
    whole = "every rank holds the whole transformer"
    own_files = "all modules come from the checkpoint"
    own_places = "offload is --dit-cpu-offload, for all modules, or --text-encoder-cpu-offload"
    return (
        ("--tp-size", server_args.tp_size > 1, whole),
        ("--dp-size", server_args.dp_size > 1, "ranks share each forward"),
        ("--kv-gather-degree", _asks(server_args, "kv_gather_degree"), "ranks exchange by Ulysses and ring"),
        ("--use-fsdp-inference", _asks(server_args, "use_fsdp_inference"), whole),
        ("--lora-path", server_args.lora_path, "adapters are not loaded"),
        ("--component-paths", server_args.component_paths, own_files),
        ("--component-weights-paths", server_args.component_weights_paths, own_files),
        ("--transformer-weights-path", server_args.transformer_weights_path, own_files),
        ("--revision", server_args.revision, "the hub's main revision is read"),
        ("--component-precisions", server_args.component_precisions.keys() - {"transformer", "vae"}, "two have theirs"),
        ("--component-quantizations", server_args.component_quantizations, "there is --quantization fp8"),
        (f"--quantization {server_args.quantization}", server_args.quantization not in (None, "fp8"), "fp8 is served"),
        ("--attention-backend", _asks(server_args, "attention_backend"), "the fastest that runs is taken"),
        ("--cache-dit-config", server_args.cache_dit_config, "every step is computed"),
        ("--enable-torch-compile", _asks(server_args, "enable_torch_compile"), "kernels are compiled already"),
        ("--component-residency", server_args.component_residency, own_places),
        ("--cpu-offload-components", _asks(server_args, "cpu_offload_components"), own_places),
        ("--layerwise-offload-components", _asks(server_args, "layerwise_offload_components"), own_places),
        ("--vae-cpu-offload", _asks(server_args, "vae_cpu_offload"), own_places),
    )
